"""The ledger's Merkle tree: roots, proofs and their verification, over nodes that someone else keeps.

Source: RFC 9162 section 2.1 (the tree of RFC 6962: SHA-256, leaves prefixed 0x00, nodes 0x01). Sizes and indices count
leaves; every hash is 32 bytes. A node (level, index) covers the 2**level leaves from index * 2**level and is complete,
so it never changes once made: a store keeps nodes for ever and hands them back through `get(level, index)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from bmoe.protocol.errors import ProofError

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
MAX_SIZE = 2**63 - 1
MAX_PATH = 64

GetNode = Callable[[int, int], bytes]
Node = tuple[int, int, bytes]


def leaf_hash(entry: bytes) -> bytes:
    """The 32-byte hash of one leaf's content."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The 32-byte hash of a node over its two children."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def verify_inclusion(index: int, size: int, leaf: bytes, path: Sequence[bytes], root: bytes) -> None:
    """Check that the leaf hash stands at `index` in the tree of `size` leaves with this root (RFC 9162, 2.1.3.2).

    `path` runs from the leaf's sibling to the root's child. Raises ProofError for anything that does not verify.
    """
    _check_position(index, size)
    _check_hashes(leaf, root, *path)
    fn, sn, computed = index, size - 1, leaf
    for sibling in path:
        if sn == 0:
            raise ProofError(f"inclusion proof of leaf {index} in size {size}: {len(path)} hashes are too many")
        if fn & 1 or fn == sn:
            computed = node_hash(sibling, computed)
            fn, sn = _skip_lone_levels(fn, sn)
        else:
            computed = node_hash(computed, sibling)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0:
        raise ProofError(f"inclusion proof of leaf {index} in size {size}: {len(path)} hashes are too few")
    _check_root("inclusion proof", size, root, computed)


def verify_consistency(size1: int, size2: int, proof: Sequence[bytes], root1: bytes, root2: bytes) -> None:
    """Check that the tree (size2, root2) only appends to the tree (size1, root1) (RFC 9162, 2.1.4.2).

    Raises ProofError for anything that does not verify. From size 0 nothing could be wrong, so a proof would say
    nothing: it is refused, as by transparency-dev/merkle.
    """
    if not 0 < size1 <= size2 <= MAX_SIZE:
        raise ProofError(f"consistency proof needs 0 < size1 <= size2 <= 2^63 - 1, got {size1} and {size2}")
    if size1 == size2:
        # Nothing is hashed here, so equality alone decides, whatever the length (a public vector has 12-byte roots).
        if proof or root1 != root2:
            raise ProofError(f"trees of size {size1} must have equal roots and an empty proof, got {len(proof)} hashes")
        return
    _check_hashes(root1, root2, *proof)
    # A complete first tree is itself the node the proof starts from, and so is left out of the proof.
    steps = [root1, *proof] if size1 & (size1 - 1) == 0 else list(proof)
    if not proof:
        raise ProofError(f"consistency proof from size {size1} to {size2} is empty")
    fn, sn = size1 - 1, size2 - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    old = new = steps[0]
    for sibling in steps[1:]:
        if sn == 0:
            raise ProofError(f"consistency proof from size {size1} to {size2}: {len(proof)} hashes are too many")
        if fn & 1 or fn == sn:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            fn, sn = _skip_lone_levels(fn, sn)
        else:
            new = node_hash(new, sibling)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0:
        raise ProofError(f"consistency proof from size {size1} to {size2}: {len(proof)} hashes are too few")
    _check_root("consistency proof", size1, root1, old)
    _check_root("consistency proof", size2, root2, new)


def root(size: int, get: GetNode) -> bytes:
    """The root of the first `size` leaves; calls `get` at most 63 times."""
    if not 0 <= size <= MAX_SIZE:
        raise ProofError(f"tree size must be 0..2^63 - 1, got {size}")
    return _range_hash(0, size, get) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, get: GetNode) -> list[bytes]:
    """The path of leaf `index` in the tree of `size` leaves, from its sibling upward (RFC 9162, 2.1.3.1)."""
    _check_position(index, size)
    low, high, siblings = 0, size, []
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            siblings.append((middle, high))
            high = middle
        else:
            siblings.append((low, middle))
            low = middle
    return [_range_hash(low, high, get) for low, high in reversed(siblings)]


def consistency_proof(size1: int, size2: int, get: GetNode) -> list[bytes]:
    """The proof that the tree of size2 leaves extends that of size1 (RFC 9162, 2.1.4.1); 0 < size1 <= size2."""
    if not 0 < size1 <= size2 <= MAX_SIZE:
        raise ProofError(f"consistency proof needs 0 < size1 <= size2 <= 2^63 - 1, got {size1} and {size2}")
    if size1 == size2:
        return []
    low, high, ranges = 0, size2, []
    while size1 != high:
        middle = low + _split(high - low)
        if size1 <= middle:
            ranges.append((middle, high))
            high = middle
        else:
            ranges.append((low, middle))
            low = middle
    if low > 0:  # otherwise the range is the whole first tree, whose root the verifier has
        ranges.append((low, high))
    return [_range_hash(low, high, get) for low, high in reversed(ranges)]


class Frontier:
    """The right edge of a growing tree: the complete subtrees, largest first, that its leaves make up.

    Append in memory, store what `append` returns, and after a failed transaction rebuild with `load`.
    """

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[bytes] = []

    @classmethod
    def load(cls, size: int, get: GetNode) -> Frontier:
        """The frontier of the first `size` leaves of a store."""
        if not 0 <= size <= MAX_SIZE:
            raise ProofError(f"tree size must be 0..2^63 - 1, got {size}")
        frontier = cls()
        levels = [level for level in reversed(range(size.bit_length())) if size >> level & 1]
        frontier._peaks = [get(level, (size >> level) - 1) for level in levels]
        _check_hashes(*frontier._peaks)
        frontier.size = size
        return frontier

    def append(self, leaf: bytes) -> list[Node]:
        """Add one leaf hash; return the complete nodes (level, index, hash) it makes, the leaf's own first."""
        _check_hashes(leaf)
        index, level, made = self.size, 0, [(0, self.size, leaf)]
        while index >> level & 1:
            leaf = node_hash(self._peaks.pop(), leaf)
            level += 1
            made.append((level, index >> level, leaf))
        self._peaks.append(leaf)
        self.size += 1
        return made

    def root(self) -> bytes:
        """The root of all leaves appended so far."""
        if not self._peaks:
            return EMPTY_ROOT
        computed = self._peaks[-1]
        for peak in reversed(self._peaks[:-1]):
            computed = node_hash(peak, computed)
        return computed


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf contents held in memory."""
    return root_over([leaf_hash(leaf) for leaf in leaves])


def root_over(hashes: Sequence[bytes]) -> bytes:
    """The root over leaf hashes.

    Level by level: a node without a sibling is carried up, which gives the tree of RFC 9162, section 2.1.1.
    """
    if not hashes:
        return EMPTY_ROOT
    level = list(hashes)
    while len(level) > 1:
        lone = level[len(level) & ~1 :]
        level = [node_hash(left, right) for left, right in zip(level[::2], level[1::2], strict=False)] + lone
    return level[0]


def row_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The inclusion proof of one of these leaf contents under `merkle_root(leaves)`."""
    frontier, nodes = Frontier(), {}
    for leaf in leaves:
        nodes.update({(level, at): node for level, at, node in frontier.append(leaf_hash(leaf))})
    return inclusion_proof(index, len(leaves), lambda level, at: nodes[level, at])


def _split(width: int) -> int:
    """The largest power of two below `width`, which is at least 2."""
    return 1 << (width - 1).bit_length() - 1


def _range_hash(low: int, high: int, get: GetNode) -> bytes:
    """The hash over leaves low..high-1, where `low` is where some subtree of the tree begins."""
    width = high - low
    if width & (width - 1) == 0:
        level = width.bit_length() - 1
        return get(level, low >> level)
    middle = low + _split(width)
    return node_hash(_range_hash(low, middle, get), _range_hash(middle, high, get))


def _skip_lone_levels(fn: int, sn: int) -> tuple[int, int]:
    """Climb past the levels where the node on the right edge has no sibling and is carried up unhashed."""
    while fn and not fn & 1:
        fn, sn = fn >> 1, sn >> 1
    return fn, sn


def _check_position(index: int, size: int) -> None:
    if not 0 <= index < size <= MAX_SIZE:
        raise ProofError(f"leaf index must be 0..size - 1 and size at most 2^63 - 1, got index {index}, size {size}")


def _check_hashes(*hashes: bytes) -> None:
    if len(hashes) > MAX_PATH + 2:
        raise ProofError(f"Merkle proof of {len(hashes) - 2} hashes is longer than any tree needs ({MAX_PATH})")
    for value in hashes:
        if not isinstance(value, bytes) or len(value) != HASH_BYTES:
            came = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
            raise ProofError(f"Merkle hash must be {HASH_BYTES} bytes, got {came}")


def _check_root(what: str, size: int, expected: bytes, computed: bytes) -> None:
    if computed != expected:
        raise ProofError(f"{what} gives root {computed.hex()} for size {size}, expected {expected.hex()}")

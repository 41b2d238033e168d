"""The Merkle tree against public vectors, a slow twin that follows the RFC's definitions, and spoiled proofs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import vectors

from bmoe.ledger.rules import merkle
from bmoe.protocol.errors import ProofError

LEAVES = [f"leaf {number}".encode() for number in range(64)]
# The leaf contents of the certificate-transparency reference tests, and the roots published for them.
REFERENCE_LEAVES = [bytes.fromhex(text) for text in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
REFERENCE_ROOTS = {
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


def slow_root(leaves: list[bytes]) -> bytes:
    """MTH as RFC 9162 section 2.1.1 defines it."""
    if not leaves:
        return merkle.EMPTY_ROOT
    if len(leaves) == 1:
        return merkle.leaf_hash(leaves[0])
    k = slow_split(len(leaves))
    return merkle.node_hash(slow_root(leaves[:k]), slow_root(leaves[k:]))


def slow_split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def slow_path(m: int, leaves: list[bytes]) -> list[bytes]:
    """PATH as RFC 9162 section 2.1.3.1 defines it."""
    if len(leaves) == 1:
        return []
    k = slow_split(len(leaves))
    if m < k:
        return [*slow_path(m, leaves[:k]), slow_root(leaves[k:])]
    return [*slow_path(m - k, leaves[k:]), slow_root(leaves[:k])]


def slow_subproof(m: int, leaves: list[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF as RFC 9162 section 2.1.4.1 defines it."""
    if m == len(leaves):
        return [] if whole else [slow_root(leaves)]
    k = slow_split(len(leaves))
    if m <= k:
        return [*slow_subproof(m, leaves[:k], whole), slow_root(leaves[k:])]
    return [*slow_subproof(m - k, leaves[k:], False), slow_root(leaves[:k])]


class Store:
    """Keeps every node a frontier makes, as a replica does, and refuses to see one change."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.nodes: dict[tuple[int, int], bytes] = {}
        self.frontier = merkle.Frontier()
        for leaf in leaves:
            self.append(leaf)

    def append(self, leaf: bytes) -> None:
        for level, index, node in self.frontier.append(merkle.leaf_hash(leaf)):
            assert (level, index) not in self.nodes
            self.nodes[level, index] = node

    def get(self, level: int, index: int) -> bytes:
        return self.nodes[level, index]


def cases(folder: str) -> list[tuple[str, dict]]:
    path = vectors(folder)
    return [(str(file.relative_to(path)), json.loads(file.read_text())) for file in sorted(path.rglob("*.json"))]


def hashes(case: dict, *names: str) -> list[bytes]:
    return [base64.b64decode(case[name]) for name in names]


def accepted(check: Callable[..., None], *args: object) -> bool:
    try:
        check(*args)
    except ProofError:
        return False
    return True


def test_every_public_inclusion_case_is_judged_as_published() -> None:
    published = cases("merkle/inclusion")
    wrong = []
    for name, case in published:
        leaf, root = hashes(case, "leafHash", "root")
        path = [base64.b64decode(item) for item in case["proof"] or []]
        args = (case["leafIdx"], case["treeSize"], leaf, path, root)
        if accepted(merkle.verify_inclusion, *args) == case["wantErr"]:
            wrong.append(f"{name}: {case['desc']}")
    assert wrong == []
    assert len(published) == 98


def test_every_public_consistency_case_is_judged_as_published() -> None:
    published = cases("merkle/consistency")
    wrong = []
    for name, case in published:
        root1, root2 = hashes(case, "root1", "root2")
        proof = [base64.b64decode(item) for item in case["proof"] or []]
        args = (case["size1"], case["size2"], proof, root1, root2)
        if accepted(merkle.verify_consistency, *args) == case["wantErr"]:
            wrong.append(f"{name}: {case['desc']}")
    assert wrong == []
    assert len(published) == 98


def test_the_rfc_6962_constants() -> None:
    assert merkle.EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert merkle.leaf_hash(b"").hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert merkle.leaf_hash(b"L123456").hex() == "395aa064aa4c29f7010acfe3f25db9485bbd4b91897b6ad7ad547639252b4d56"
    node = merkle.node_hash(b"N123", b"N456").hex()
    assert node == "aa217fe888e47007fa15edab33c2b492a722cb106c64667fc2b044444de66bbb"
    for size, root in REFERENCE_ROOTS.items():
        assert merkle.merkle_root(REFERENCE_LEAVES[:size]).hex() == root


def test_a_leaf_never_passes_for_a_node() -> None:
    left, right = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    assert merkle.leaf_hash(left + right) != merkle.node_hash(left, right)


def test_roots_and_all_proofs_up_to_64_leaves_equal_the_slow_twin() -> None:
    store = Store(LEAVES)
    inclusions = consistencies = 0
    roots = [slow_root(LEAVES[:size]) for size in range(65)]
    for size in range(1, 65):
        leaves = LEAVES[:size]
        assert merkle.root(size, store.get) == roots[size] == merkle.Frontier.load(size, store.get).root()
        for index in range(size):
            path = merkle.inclusion_proof(index, size, store.get)
            assert path == slow_path(index, leaves)
            merkle.verify_inclusion(index, size, merkle.leaf_hash(leaves[index]), path, roots[size])
            inclusions += 1
        for old in range(1, size + 1):
            proof = merkle.consistency_proof(old, size, store.get)
            assert proof == slow_subproof(old, leaves, True)
            merkle.verify_consistency(old, size, proof, roots[old], roots[size])
            consistencies += 1
    assert (inclusions, consistencies) == (2080, 2080)


def test_a_proof_holds_for_no_other_index_size_or_leaf() -> None:
    store = Store(LEAVES[:40])
    for size in (1, 2, 7, 33, 40):
        root = merkle.root(size, store.get)
        for index in range(size):
            path = merkle.inclusion_proof(index, size, store.get)
            leaf = merkle.leaf_hash(LEAVES[index])
            for other in set(range(size)) - {index}:
                assert not accepted(merkle.verify_inclusion, other, size, leaf, path, root)
                assert not accepted(merkle.verify_inclusion, index, size, merkle.leaf_hash(LEAVES[other]), path, root)


def test_a_rewritten_past_leaf_has_no_consistency_proof() -> None:
    honest, forged = Store(LEAVES[:20]), Store([*LEAVES[:3], b"rewritten", *LEAVES[4:33]])
    for size1 in range(4, 21):
        proof = merkle.consistency_proof(size1, 33, forged.get)
        root1, root2 = merkle.root(size1, honest.get), merkle.root(33, forged.get)
        with pytest.raises(ProofError, match="consistency proof gives root"):
            merkle.verify_consistency(size1, 33, proof, root1, root2)


def test_a_size_that_understates_the_tree_is_noticed_by_the_length_of_the_proof() -> None:
    store = Store(LEAVES[:4])
    root, last = merkle.root(4, store.get), merkle.leaf_hash(LEAVES[3])
    with pytest.raises(ProofError, match="too many"):
        merkle.verify_inclusion(0, 1, last, merkle.inclusion_proof(3, 4, store.get), root)
    roots = [merkle.root(size, store.get) for size in range(5)]
    with pytest.raises(ProofError, match="too many"):
        merkle.verify_consistency(2, 3, [*merkle.consistency_proof(2, 4, store.get), last], roots[2], roots[4])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_flipped_bit_anywhere_spoils_an_inclusion_proof(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 64))
    index = data.draw(st.integers(0, size - 1))
    store = Store(LEAVES[:size])
    path = merkle.inclusion_proof(index, size, store.get)
    items = [merkle.leaf_hash(LEAVES[index]), *path, merkle.root(size, store.get)]
    items = flipped(data, items)
    with pytest.raises(ProofError):
        merkle.verify_inclusion(index, size, items[0], items[1:-1], items[-1])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_flipped_bit_anywhere_spoils_a_consistency_proof(data: st.DataObject) -> None:
    size2 = data.draw(st.integers(1, 64))
    size1 = data.draw(st.integers(1, size2))
    store = Store(LEAVES[:size2])
    proof = merkle.consistency_proof(size1, size2, store.get)
    items = flipped(data, [merkle.root(size1, store.get), *proof, merkle.root(size2, store.get)])
    with pytest.raises(ProofError):
        merkle.verify_consistency(size1, size2, items[1:-1], items[0], items[-1])


def flipped(data: st.DataObject, items: list[bytes]) -> list[bytes]:
    which, bit = data.draw(st.integers(0, len(items) - 1)), data.draw(st.integers(0, 255))
    changed = int.from_bytes(items[which], "big") ^ 1 << bit
    return [*items[:which], changed.to_bytes(32, "big"), *items[which + 1 :]]


@given(st.integers(-2, 2**70), st.integers(-2, 2**70), st.lists(st.binary(min_size=32, max_size=32), max_size=70))
def test_made_up_proofs_of_any_size_are_refused_and_never_crash(a: int, b: int, path: list[bytes]) -> None:
    root, other = merkle.leaf_hash(b"root"), merkle.leaf_hash(b"other")
    with pytest.raises(ProofError):
        merkle.verify_inclusion(a, b, other, path, root)
    with pytest.raises(ProofError):
        merkle.verify_consistency(a, b, path, other, root)


@pytest.mark.parametrize("spoiled", [b"", bytes(31), bytes(33), "a" * 32, None])
def test_a_hash_that_is_not_32_bytes_is_refused_everywhere(spoiled: object) -> None:
    good = bytes(32)
    for args in ((spoiled, [good], good), (good, [spoiled], good), (good, [good], spoiled)):
        with pytest.raises(ProofError, match="must be 32 bytes"):
            merkle.verify_inclusion(0, 2, *args)  # type: ignore[arg-type]
    for proof, root1, root2 in (([spoiled], good, good), ([good], spoiled, good), ([good], good, spoiled)):
        with pytest.raises(ProofError, match="must be 32 bytes"):
            merkle.verify_consistency(1, 2, proof, root1, root2)  # type: ignore[arg-type]
    with pytest.raises(ProofError, match="must be 32 bytes"):
        merkle.Frontier().append(spoiled)  # type: ignore[arg-type]


def test_an_endless_proof_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProofError, match="longer than any tree"):
        merkle.verify_inclusion(0, 2, bytes(32), [bytes(32)] * 100_000, bytes(32))


def test_no_proof_is_made_for_what_the_tree_does_not_hold() -> None:
    store = Store(LEAVES[:4])
    for index, size in ((4, 4), (-1, 4), (0, 0)):
        with pytest.raises(ProofError, match="leaf index"):
            merkle.inclusion_proof(index, size, store.get)
    for size1, size2 in ((0, 4), (3, 2), (-1, 2)):
        with pytest.raises(ProofError, match="consistency proof needs"):
            merkle.consistency_proof(size1, size2, store.get)
    with pytest.raises(ProofError, match="tree size"):
        merkle.root(-1, store.get)


def test_a_frontier_rebuilt_from_the_store_at_any_size_grows_the_same_tree() -> None:
    whole = Store(LEAVES)
    for size in range(65):
        frontier = merkle.Frontier.load(size, whole.get)
        for leaf in LEAVES[size:]:
            for level, index, node in frontier.append(merkle.leaf_hash(leaf)):
                assert whole.get(level, index) == node
        assert (frontier.size, frontier.root()) == (64, whole.frontier.root())


def test_a_refused_leaf_leaves_the_frontier_as_it_was() -> None:
    frontier = Store(LEAVES[:7]).frontier
    before = frontier.root()
    with pytest.raises(ProofError):
        frontier.append(b"not a hash")
    assert (frontier.size, frontier.root()) == (7, before)


def test_one_row_of_a_batch_is_proved_without_the_others() -> None:
    rows = [bytes([number]) * 40 for number in range(11)]
    root = merkle.merkle_root(rows)
    for index, row in enumerate(rows):
        merkle.verify_inclusion(index, 11, merkle.leaf_hash(row), merkle.row_proof(rows, index), root)
    assert merkle.merkle_root([]) == merkle.EMPTY_ROOT
    assert root != merkle.merkle_root(rows[::-1])


def test_the_tiles_of_a_log_written_by_other_software_have_the_roots_it_signed() -> None:
    log: Path = vectors("tessera-log")
    tile = (log / "tile/0/000.p/15").read_bytes()
    frontier = merkle.Frontier()
    for index in range(15):
        signed_root = base64.b64decode((log / f"checkpoint.{index}").read_text().split("\n")[2])
        assert frontier.root() == signed_root
        entries = tessera_entries((log / f"tile/entries/000.p/{index + 1}").read_bytes())
        assert (log / f"tile/0/000.p/{index + 1}").read_bytes() == b"".join(map(merkle.leaf_hash, entries))
        assert merkle.leaf_hash(entries[index]) == tile[32 * index : 32 * index + 32]
        frontier.append(tile[32 * index : 32 * index + 32])
    assert frontier.root() == base64.b64decode((log / "checkpoint").read_text().split("\n")[2])


def tessera_entries(bundle: bytes) -> list[bytes]:
    """The entries of a tlog-tiles bundle: each a big-endian uint16 length and its bytes."""
    entries = []
    while bundle:
        length = int.from_bytes(bundle[:2], "big")
        entries.append(bundle[2 : 2 + length])
        bundle = bundle[2 + length :]
    return entries

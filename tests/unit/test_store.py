"""The replica: killed at any moment it keeps no promise without its leaves, and it never signs two roots for a size.

Run as a script (PATH) it appends and signs for ever, for the test that kills it.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from bmoe.ledger.rules.checkpoint import parse_checkpoint, parse_note
from bmoe.ledger.rules.entries import Rejected, parse_entry
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.merkle import leaf_hash, merkle_root, verify_inclusion
from bmoe.ledger.store import NOTES_KEPT, Store
from bmoe.protocol.errors import ConfigError, LedgerError, LedgerForkError

LEDGER, EPOCH = bytes(range(16)), 3


def leaf(number: int) -> bytes:
    common = {"ledger": LEDGER, "epoch": EPOCH, "author": "x", "seq": number, "time_ms": number}
    return Rejected(**common, digest=bytes(32), reason=f"leaf {number}").to_bytes()


def message(position: int) -> bytes:
    return b"message %d" % position


def open_store(path: Path, **limits: int) -> Store:
    return Store(path, LEDGER, EPOCH, **limits)


def folded(leaves: list[bytes]) -> Applied:
    return Applied(tuple(leaves), tuple(map(parse_entry, leaves)), ())


def append(store: Store, leaves: int = 3, tick: bool = True, openings: dict[bytes, bytes] | None = None) -> int:
    """The next position with that many leaves; the size behind it."""
    first = store.size if not store._leaves else store._leaves[-1][0] + 1
    made = folded([leaf(i) for i in range(first, first + leaves)])
    size = first + leaves
    store.append(store.next_position, message(store.next_position), made, [size] if tick else [], openings or {})
    return size


def test_what_is_committed_is_there_again_and_proves_every_leaf(tmp_path: Path) -> None:
    store = open_store(tmp_path / "v" / "replica.db")
    for _ in range(7):
        append(store)
        store.commit()
    append(store, tick=False)
    store.close()
    again = open_store(tmp_path / "v" / "replica.db")
    assert (again.size, again.position) == (21, 7)
    for size in (1, 5, 21):
        root = merkle_root([leaf(i) for i in range(size)])
        for idx in range(size):
            verify_inclusion(idx, size, leaf_hash(again.leaf(idx)), again.proof(idx, size), root)
    append(again, leaves=2)
    ((size, root),) = again.commit()
    assert (size, root) == (23, merkle_root([leaf(i) for i in range(23)]))


def test_uncommitted_leaves_can_be_read_and_leaves_beyond_are_an_error(tmp_path: Path) -> None:
    store = open_store(tmp_path / "replica.db")
    append(store)
    store.commit()
    append(store)
    assert [store.leaf(i) for i in range(6)] == [leaf(i) for i in range(6)]
    with pytest.raises(LedgerError, match="no leaf 6, its size is 6"):
        store.leaf(6)
    with pytest.raises(LedgerError, match="expects position 3, position 5 came"):
        store.append(5, b"", folded([]), [], {})


def test_one_root_a_size_and_sizes_only_grow(tmp_path: Path) -> None:
    store = open_store(tmp_path / "replica.db")
    size = append(store)
    ((_, root),) = store.commit()
    store.promise(size, root)
    with pytest.raises(LedgerForkError, match=r"size 3 was promised with root .* never sign both"):
        store.promise(size, bytes(32))
    with pytest.raises(LedgerForkError, match="size 2 comes after size 3"):
        store.promise(2, bytes(32))
    store.close()
    with pytest.raises(LedgerForkError):
        open_store(tmp_path / "replica.db").promise(size, bytes(32))


def test_a_fork_in_the_commit_leaves_nothing_of_it(tmp_path: Path) -> None:
    store = open_store(tmp_path / "replica.db")
    store.promise(3, bytes(32))
    append(store)
    with pytest.raises(LedgerForkError):
        store.commit()
    store.close()
    assert open_store(tmp_path / "replica.db").size == 0


def test_message_changed_at_a_replayed_position_is_a_fork_with_both_digests(tmp_path: Path) -> None:
    store = open_store(tmp_path / "replica.db")
    append(store, leaves=2)
    store.commit()
    held = store.held(1, message(1))
    assert held is not None and held.leaves == (leaf(0), leaf(1)) and held.rejected
    assert store.held(2, message(2)) is None
    with pytest.raises(LedgerForkError, match=r"position 1 changed: it held a message of SHA-256 [0-9a-f]{64}, .* now"):
        store.held(1, b"another")


def test_crash_between_promise_and_note_signs_the_same_root_again(tmp_path: Path) -> None:
    store = open_store(tmp_path / "replica.db")
    first = append(store)
    store.commit()
    store.keep_notes([(first, "note")])
    second = append(store)
    ((_, root),) = store.commit()
    store.close()
    again = open_store(tmp_path / "replica.db")
    assert (again.signed_size(), again.unsigned()) == (first, [(second, root)])
    again.keep_notes([(second, "second")])
    assert again.unsigned() == [] and again.note(second) == "second"
    assert again.last_notes(1) == [(second, "second")]


def test_other_ledger_epoch_or_version_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "replica.db"
    open_store(path).close()
    with pytest.raises(ConfigError, match=f"has ledger {LEDGER.hex()}, expected {'00' * 16}: move it away"):
        Store(path, bytes(16), EPOCH)
    with pytest.raises(ConfigError, match="has epoch 3, expected 4"):
        Store(path, LEDGER, 4)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
    db.close()
    with pytest.raises(ConfigError, match="has schema 99, expected 1"):
        open_store(path)


def test_second_process_on_one_replica_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "replica.db")
    with pytest.raises(LedgerError, match="another process uses it"):
        open_store(tmp_path / "replica.db")
    store.close()
    open_store(tmp_path / "replica.db").close()


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "replica.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match=r"replica\.db.* is damaged: .*move this file away.*it is built anew"):
        open_store(path)


def test_a_replica_with_torn_pages_is_named_with_the_way_out_which_leads_to_the_same_root(tmp_path: Path) -> None:
    path = tmp_path / "replica.db"
    store = open_store(path)
    for _ in range(20):
        append(store, leaves=50)
    signed = store.commit()
    store.close()
    sound = path.read_bytes()
    path.write_bytes(sound[:4096] + b"\xa5" * (len(sound) - 4096))
    with pytest.raises(
        LedgerError, match=r"replica\.db is damaged: .*copy the state directory, then move this file away"
    ):
        open_store(path)
    path.rename(tmp_path / "copy.db")
    anew = open_store(path)
    for _ in range(20):
        append(anew, leaves=50)
    assert anew.commit() == signed and len(signed) == 20
    anew.close()


def test_openings_are_bounded_by_count_and_bytes_oldest_first(tmp_path: Path) -> None:
    store = open_store(tmp_path / "replica.db", openings_bytes=2500, openings_count=4)
    for i in range(6):
        append(store, openings={bytes([i]) * 32: bytes(500), bytes([0]) * 32: bytes(500)})
        store.commit()
    kept = [i for i in range(6) if store.opening(bytes([i]) * 32) is not None]
    assert len(kept) == 4 and kept[-3:] == [3, 4, 5]
    append(store, openings={b"\x63" * 32: bytes(2400)})
    store.commit()
    assert [i for i in range(6) if store.opening(bytes([i]) * 32)] == [] and store.opening(b"\x63" * 32)
    store.close()
    assert open_store(tmp_path / "replica.db", openings_bytes=2500)._kept == (1, 2400)


def test_old_notes_are_forgotten_and_their_sizes_stay_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "replica.db")
    made = [leaf(i) for i in range(NOTES_KEPT + 10)]
    store.append(1, b"m", folded(made), range(1, len(made) + 1), {})
    roots = store.commit()
    store.keep_notes([(size, "note") for size, _ in roots])
    append(store)
    store.commit()
    assert store.note(1) is None and store.note(len(made)) == "note"
    with pytest.raises(LedgerForkError):
        store.promise(1, bytes(32))


def test_output_numbers_grow_across_restarts(tmp_path: Path) -> None:
    store = open_store(tmp_path / "replica.db")
    assert [store.next_output_seq() for _ in range(3)] == [1, 2, 3]
    store.close()
    assert open_store(tmp_path / "replica.db").next_output_seq() == 4


def test_killed_at_any_moment_no_note_stands_without_its_leaves(tmp_path: Path) -> None:
    """kill -9 in the middle of appends, five times on one file: sizes only grow, and every note's root is the tree's."""
    path, last = tmp_path / "replica.db", 0
    for life in range(5):
        child = subprocess.Popen([sys.executable, __file__, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(3 + 7 * life)]
        os.kill(child.pid, signal.SIGKILL)
        rest = child.stdout.read().split("\n")[:-1]
        child.wait()
        child.stdout.close()
        newest = int(rest[-1]) if rest else told[-1]
        store = open_store(path)
        assert told[0] > last and (store.signed_size() or 0) >= newest > last
        leaves = [store.leaf(i) for i in range(store.size)]
        assert leaves == [leaf(i) for i in range(store.size)]
        for size, note in store.last_notes(NOTES_KEPT):
            checkpoint = parse_checkpoint(parse_note(note).text)
            assert checkpoint.size == size <= store.size
            assert checkpoint.root == merkle_root(leaves[:size])
        for size, root in store.unsigned():
            assert size <= store.size and root == merkle_root(leaves[:size])
        last = store.signed_size() or 0
        store.close()


def work(path: Path) -> None:
    """Append, promise, sign and tell each size signed, for ever."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from bmoe.ledger.rules.checkpoint import Checkpoint, cosign

    key, store = Ed25519PrivateKey.from_private_bytes(bytes(32)), open_store(path)
    roots = store.unsigned()
    while True:
        for size, root in roots:
            body = Checkpoint("bmoe.test/ledger", size, root).body()
            store.keep_notes([(size, body + "\n" + cosign(body, "validator-1", key, 1))])
            print(size, flush=True)
        for _ in range(3):
            append(store)
        roots = store.commit()


if __name__ == "__main__":
    work(Path(sys.argv[1]))

"""Drafts of a repository's metadata: exported, signed where the keys are, and taken back.

A file of drafts is JSON: {"format": 1, "documents": {role: metadata}, "signers": {role: [key ids that may sign it]}}.
What comes back is judged as a reader would: the next version of each role, signed as whoever delegates to it says.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Targets

from bmoe.protocol.errors import InputError, RefusedError, UnknownError
from bmoe.protocol.text import plain
from bmoe.storage.blobs import Store
from bmoe.storage.repository_read import KINDS
from bmoe.storage.repository_roles import ONLINE, TOP, Roles
from bmoe.storage.targets import METADATA_BYTES, blob_path, is_target

FORMAT = 1
# A root, the targets and an owner's metadata, each with its signatures.
DRAFTS_BYTES = 3 * METADATA_BYTES


def write_drafts(drafts: Mapping[str, bytes], signers: Mapping[str, list[str]]) -> bytes:
    """The file to take to where the keys are."""
    documents = {role: json.loads(data) for role, data in drafts.items()}
    return (json.dumps({"format": FORMAT, "documents": documents, "signers": dict(signers)}, indent=1) + "\n").encode()


def read_drafts(data: bytes) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    """Documents and signers of such a file; raises InputError."""
    try:
        values = json.loads(data[: DRAFTS_BYTES + 1])
        if values["format"] != FORMAT:
            raise InputError(f"drafts of format {values['format']!r}, this version reads {FORMAT}")
        signers = {role: [str(keyid) for keyid in keyids] for role, keyids in values["signers"].items()}
        documents = {role: json.dumps(document).encode() for role, document in values["documents"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"not a file of drafts to sign: {error!r}"[:300]) from None
    for role, document in documents.items():
        parse(role, document)
    return documents, signers


def sign_drafts(data: bytes, signer: CryptoSigner) -> tuple[bytes, list[str]]:
    """The file with this key's signatures added, and the roles that it signed; raises InputError."""
    documents, signers = read_drafts(data)
    signed = [role for role in documents if signer.public_key.keyid in signers.get(role, ())]
    for role in signed:
        metadata = parse(role, documents[role])
        metadata.sign(signer, append=True)
        documents[role] = metadata.to_bytes()
    return write_drafts(documents, signers), signed


def described(data: bytes) -> list[str]:
    """What a file of drafts would have one sign, line by line; raises InputError."""
    lines = []
    for role, document in read_drafts(data)[0].items():
        signed = parse(role, document).signed
        lines.append(f"{role} version {signed.version}, until {signed.expires:%Y-%m-%d}")
        if isinstance(signed, Root):
            lines += [f"  {name}: {one.threshold} of {_short(one.keyids)}" for name, one in signed.roles.items()]
        elif isinstance(signed, Targets):
            for name, one in (signed.delegations.roles or {}).items() if signed.delegations else ():
                lines.append(f"  {name}: {one.threshold} of {_short(one.keyids)}, for {', '.join(one.paths or ())}")
            lines += [
                f"  {path}  {target.length} bytes  {target.hashes.get('sha256', '')}"
                for path, target in sorted(signed.targets.items())
            ]
    return [plain(line, 300) for line in lines]


def parse(role: str, document: bytes) -> Metadata[Any]:
    """A role's metadata as it came; raises InputError for another kind, and for a role that is signed at every change."""
    try:
        found: Metadata[Any] = Metadata.from_bytes(document)
    except RepositoryError as error:
        raise InputError(f"the draft of {role[:80]} is no metadata: {error}"[:300]) from None
    if role in ONLINE or not isinstance(found.signed, KINDS.get(role, Targets)):
        raise InputError(f"a draft of {role[:80]} of type {found.signed.type} is none to sign elsewhere")
    return found


def place(store: Store, roles: Roles, documents: Mapping[str, bytes], now: dt.datetime) -> None:
    """Put drafts in the place of the roles' metadata, unless they are not what may come next; signatures of those that
    root and targets delegate to are verified by whoever writes them."""
    for role in sorted(documents, key=lambda role: (role != "root", role != "targets")):
        new = parse(role, documents[role])
        known = roles.named(role) if role in TOP else roles.owners.get(role)
        version = known.signed.version if known is not None else 0
        if new.signed.version != version + 1:
            raise RefusedError(
                f"{role} is at version {version} by now, the draft is {new.signed.version}: make it anew"
            )
        if new.signed.expires <= now:
            raise RefusedError(f"the draft of {role} expired on {new.signed.expires:%Y-%m-%d}: make it anew")
        if role == "root":
            _signed_by_the_one_before(roles, new)
        if role in TOP:
            setattr(roles, role, new)
        else:
            _check_targets(store, roles, role, new)
            roles.owners[role] = new
        roles.changed.add(role)


def still_counts(before: Roles, documents: Mapping[str, bytes]) -> bool:
    """Whether targets, if they are among the drafts, are signed as the root of today says too."""
    if "targets" not in documents:
        return True
    new = parse("targets", documents["targets"])
    return bool(before.root.signed.get_verification_result("targets", new.signed_bytes, new.signatures))


def new_keys(before: Roles, root: bytes, names: Iterable[str]) -> dict[str, list[str]]:
    """The keys of each of these roles, where a draft of root gives them others."""
    roles = parse("root", root).signed.roles
    return {name: roles[name].keyids for name in names if roles[name].keyids != before.trusts(name).keyids}


def keys_of(roles: Roles) -> set[str]:
    """The ids of all keys that sign anything."""
    delegations = roles.targets.signed.delegations
    owners = (delegations.roles or {}).values() if delegations else ()
    return {keyid for one in (*roles.root.signed.roles.values(), *owners) for keyid in one.keyids}


def _signed_by_the_one_before(roles: Roles, new: Metadata[Root]) -> None:
    try:
        roles.root.signed.verify_delegate("root", new.signed_bytes, new.signatures)
    except UnsignedMetadataError as error:
        raise RefusedError(f"the draft of root is not signed by the keys that it has today: {error}") from None


def _check_targets(store: Store, roles: Roles, role: str, new: Metadata[Targets]) -> None:
    delegations = roles.targets.signed.delegations
    delegated = (delegations.roles or {}).get(role) if delegations else None
    if delegated is None:
        raise UnknownError(f"the repository has no role {role[:80]}, nor do these drafts make it")
    known = roles.owners[role].signed.targets if role in roles.owners else {}
    for path, target in new.signed.targets.items():
        if path in known and known[path] == target:
            continue
        if not is_target(path) or not delegated.is_delegated_path(path):
            raise RefusedError(f"{path[:200]} is no target of {role}'s")
        size = store.size(blob_path(target.hashes.get("sha256", "none")))
        if size != target.length:
            raise RefusedError(
                f"{path}: the store has {size} bytes of it, {target.length} are stated: publish it again"
            )


def _short(keyids: Iterable[str]) -> str:
    return ", ".join(keyid[:12] for keyid in keyids)

"""Who is enrolled and who is revoked: a view in memory, fed by the ledger's follower, asked at every connection."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe.protocol.messages import Member


@dataclass(frozen=True)
class Known:
    """A name that may hold a certificate: its role, owner, signing key, and the TLS key that it enrolled with."""

    name: str
    role: str
    owner: str
    public_key: bytes
    spki: bytes
    statement: bytes = b""


class Directory:
    """Names to what is known of them, and a deny list that nothing enrolled later overrules."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}
        self._revoked: dict[str, str] = {}
        self._by_key: dict[bytes, str] = {}

    def enrolled(self, member: Member, statement: bytes) -> None:
        """Take note of a Member statement of the ledger; the latest of a name counts."""
        known = Known(member.member, member.role, member.owner, member.public_key, member.spki, statement)
        self._known[member.member] = known
        self._by_key[member.public_key] = member.member

    def administrator(self, name: str, spki: bytes) -> None:
        """Take note of the operator's own certificate, which stands on no ledger."""
        self._known[name] = Known(name, "administrator", "", b"", spki)

    def revoked(self, name: str, reason: str) -> bool:
        """Deny `name` from now on; True if it was not denied already."""
        fresh = name not in self._revoked
        self._revoked.setdefault(name, reason)
        return fresh

    def find(self, name: str) -> Known | None:
        """What is known of a name."""
        return self._known.get(name)

    def name_of_key(self, public_key: bytes) -> str | None:
        """The name under which a signing key is enrolled."""
        return self._by_key.get(public_key)

    def revocation(self, name: str) -> str | None:
        """Why a name is denied, or None."""
        return self._revoked.get(name)

    def revocations(self) -> list[tuple[str, str]]:
        """(name, reason) of all that are denied, by name."""
        return sorted(self._revoked.items())

    def everyone(self) -> list[Known]:
        """All that is known, by name."""
        return [self._known[name] for name in sorted(self._known)]

"""What of a data set is no data, and why: hidden and system names, and the account of everything that was left out."""

from __future__ import annotations

import os
from collections.abc import Container

from alitok_fast.storage.text import shown

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"})
_SYSTEM_NAMES = frozenset(
    {"__macosx", "__pycache__", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information",
     "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)  # fmt: skip
Reason = tuple[str, str]  # for one thing, for several
HIDDEN: Reason = ("hidden or system name", "hidden or system names")
OTHER_FILES: Reason = ("file of another kind", "files of other kinds")
LOOSE: Reason = ("picture beside the class folders", "pictures beside the class folders")
EMPTY: Reason = ("folder without pictures", "folders without pictures")
OTHER_SPLITS: Reason = ("folder that is no split", "folders that are no split")
TWICE: Reason = ("link to a folder that was read already", "links to folders that were read already")
UNREADABLE: Reason = ("unreadable picture", "unreadable pictures")
UNLISTED: Reason = ("picture that the list does not name", "pictures that the list does not name")
SKIPPED: Reason = ("sample of the skip list", "samples of the skip list")
SHARDS: Reason = ("shard of no split", "shards of no split")
SPECIAL: Reason = ("link, sparse file or device in a shard", "links, sparse files or devices in shards")
OUTSIDE: Reason = ("name that leads out of its shard", "names that lead out of their shards")
REPEATED: Reason = ("member that its sample has already", "members that their samples have already")
TOO_LARGE: Reason = ("picture larger than 512 MiB in a shard", "pictures larger than 512 MiB in shards")
NO_PICTURE: Reason = ("sample without a picture", "samples without a picture")
NO_LABEL: Reason = ("sample without a label", "samples without a label")
BAD_LABEL: Reason = ("sample whose label is no number and no name", "samples whose labels are no numbers and no names")
OUT_OF_RANGE: Reason = ("sample whose label is out of range", "samples whose labels are out of range")
MISSING: Reason = ("listed file that is not there", "listed files that are not there")
DAMAGED: Reason = ("damaged shard", "damaged shards")

WRONG_LABELS = (NO_LABEL, BAD_LABEL, OUT_OF_RANGE)
"""Reasons about labels: training on what is left is a choice (on_error="skip")."""
LOST = (MISSING, DAMAGED)
"""Reasons about samples that cannot be read: a choice as well."""
UNREMARKABLE = frozenset({HIDDEN, EMPTY, SKIPPED})
"""Reasons that call for no warning."""
_MOST_NAMES = 1000  # kept for a reason that is only counted
MOST_CLASSES = 1_000_000  # a label beyond is a mistake, and a name for each would take gigabytes


class LeftOut:
    """How many things were left out, for each reason, and how they are called.

    Of wrong labels and lost samples, which a skip list can settle, all names are kept; of the others the first 1,000.
    `details` says more about some of them, by name.
    """

    def __init__(self) -> None:
        self.counts: dict[Reason, int] = {}
        self.names: dict[Reason, list[str]] = {}
        self.details: dict[str, str] = {}

    def add(self, reason: Reason, name: str | os.PathLike, detail: str = "") -> None:
        self.restore(reason, 1, [os.fspath(name)])
        if detail:
            self.details[os.fspath(name)] = detail

    def restore(self, reason: Reason, count: int, names: list[str]) -> None:
        """Add what another account says for one reason."""
        if count < 1 or not names:
            raise ValueError(f"{reason[0]}: expected a count and names, got {count} and {len(names)} names")
        self.counts[reason] = self.counts.get(reason, 0) + count
        kept = self.names.setdefault(reason, [])
        if reason in (*WRONG_LABELS, *LOST):
            kept += names
        else:
            kept += names[: max(0, _MOST_NAMES - len(kept))]

    def settle(self, names: Container[str]) -> int:
        """Count wrong labels and lost samples of these names as skipped on purpose; how many there were."""
        settled = 0
        for reason in (*WRONG_LABELS, *LOST):
            every = self.names.get(reason, [])
            self.names[reason] = [name for name in every if name not in names]
            self.counts[reason] = len(self.names[reason])
            if not self.counts[reason]:
                del self.counts[reason], self.names[reason]
            known = [name for name in every if name in names]
            if known:
                self.restore(SKIPPED, len(known), known)
            settled += len(known)
        return settled

    @property
    def doubtful(self) -> bool:
        """Whether something was left out that may be data."""
        return not UNREMARKABLE.issuperset(self.counts)

    def said(self, reason: Reason) -> str:
        """How many for one reason, with an example."""
        count, example = self.counts[reason], os.path.basename(self.names[reason][0])
        detail = self.details.get(self.names[reason][0], "")
        return f"{count:,} {reason[count > 1]} (such as '{shown(example)}'{detail and ': '}{shown(detail, limit=200)})"

    def __str__(self) -> str:
        return ", ".join(map(self.said, self.counts))


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or one that an operating system leaves behind."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES

"""What every recording has is no exception: where it makes training wrong, so are all the data.

Of some recordings it may be meant: in a list beside others Moshi may only listen."""

from collections.abc import Sequence

from finetune.data.inspection.findings import Finding
from finetune.data.transcripts import MAIN_SPEAKER
from finetune.errors import counted

KINDS = ("swapped-channels", "no-main-speaker", "no-words")
"""Warnings of one recording that mean, where all have them, that nothing is learned right."""

_OTHER_NAMES = f"write {MAIN_SPEAKER} in place of the name that the transcripts give Moshi"


def wrong_in_all(found: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Return an error for each kind of warning that makes all the data wrong.

    Args:
        found: of each recording that can be used, of all lists that are trained on together.
    """
    wrong = [[each for each in findings if each.code in KINDS] for findings in found]
    if not wrong or not all(wrong):
        return []
    errors = []
    for code in dict.fromkeys(each.code for findings in wrong for each in findings):
        same = [each for findings in wrong for each in findings if each.code == code]
        has_other_names = code == "no-main-speaker" and len({each.remedy for each in same}) > 1
        errors.append(
            Finding(
                "in-every-recording",
                "error",
                f"{code} in {len(same)} of {counted(len(found), 'recording')}, and none is right, "
                f"so that training on this would be wrong. First: {same[0].message}",
                _OTHER_NAMES if has_other_names else same[0].remedy,
            )
        )
    return errors


def as_errors(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings of a recording of such data, with those that make it wrong as
    errors."""
    return [each._replace(severity="error") if each.code in KINDS else each for each in findings]

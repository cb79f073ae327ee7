"""The inspection of all recordings: `moshi-ttt data check`."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from finetune.data import (
    INSPECTION_VERSION,
    Finding,
    Inspection,
    ReadCodes,
    Recording,
    TextEncoder,
    as_errors,
    inspect_listing,
    wrong_in_all,
)
from finetune.kept import write_whole
from finetune.monitoring import console
from finetune.recordings.check_page import page_of
from finetune.recordings.check_report import Checked, Report, as_json, sentences, summary_table
from finetune.recordings.encoder import WordStart, text_encoder
from finetune.recordings.ledger import Ledger, file_key
from finetune.recordings.listing import Listing, list_data
from finetune.recordings.options import CheckOptions
from finetune.recordings.work import do_all

_LINE_REMEDY = "correct the line, or what it names, as the message says"
_WITHOUT_TOKENS = "text tokens were not looked at: no tokenizer is here, name one: --tokenizer"

_FAST_AT_ONCE = 16
"""Recordings that a worker looks at before it hands back what it found: some 50 ms."""


def check_data(options: CheckOptions, overrides: Mapping[str, Any]) -> bool:
    """Inspect all recordings of a JSONL or of a run, and say what was found.

    Returns:
        Whether there is no error.

    Raises:
        UserError: see `inspect_data`.
    """
    report = inspect_data(options, overrides)
    if options.json is not None:
        write_whole(options.json, json.dumps(as_json(report), ensure_ascii=False, indent=1) + "\n")
    if options.html is not None:
        write_whole(options.html, page_of(report))
    if (table := summary_table(report)) is not None:
        console.print(table)
    for sentence in sentences(report):
        console.print(sentence, markup=False, soft_wrap=True)
    return not report.num_errors and all(each.severity != "error" for each in report.together)


def inspect_data(options: CheckOptions, overrides: Mapping[str, Any]) -> Report:
    """Inspect all recordings of a JSONL or of a run, over processes.

    What is finished is kept in `options.cache`: stopped and called again, it goes on.

    Raises:
        UserError: nothing is there, or a file cannot be read or written.
    """
    listing = list_data(options.data, overrides)
    tokenizer = options.tokenizer or listing.tokenizer
    # What is wrong with it is said once, and here.
    text = text_encoder(tokenizer, listing.word_start) if tokenizer is not None else None
    work = partial(
        _inspect,
        thorough=not options.fast,
        tokenizer=tokenizer,
        word_start=listing.word_start,
        reads=listing.reads,
    )
    found, is_new = _inspect_all(options, listing, work, text)
    together = _wrong_as_a_whole(listing, found)
    checked = [
        Checked(origin, "", 0.0, 0, 0, [Finding("malformed-line", "error", problem, _LINE_REMEDY)])
        for origin, problem in listing.problems
    ]
    checked += [Checked(each.origin, str(each.path), *_facts(found[each])) for each in listing.all]
    together += inspect_listing(
        listing.recordings,
        listing.evaluation,
        {recording: each.digest for recording, each in found.items()},
    )
    said_before = () if is_new else (_WITHOUT_TOKENS,)
    return Report(options.data, checked, together, _notes(options, tokenizer, listing), said_before)


def _wrong_as_a_whole(listing: Listing, found: Mapping[Recording, Inspection]) -> list[Finding]:
    """Return what is wrong with all data of training or of evaluation, and make it an error of
    each recording."""
    errors = []
    are_wrong: list[Inspection] = []
    for key, recordings in (("", listing.recordings), ("data.eval_data: ", listing.evaluation)):
        usable = [found[each] for each in recordings if not found[each].errors]
        wrong = wrong_in_all([each.findings for each in usable])
        errors += [each._replace(message=f"{key}{each.message}") for each in wrong]
        are_wrong += usable if wrong else []
    for inspection in are_wrong:
        inspection.findings = as_errors(inspection.findings)
    return errors


def _facts(found: Inspection) -> tuple[float, int, int, list[Finding]]:
    return found.duration_sec, found.sample_rate_hz, found.num_channels, found.findings


def _notes(options: CheckOptions, tokenizer: Path | None, listing: Listing) -> list[str]:
    notes = []
    if options.fast:
        notes.append("of the audio, a few words of each recording were heard (--fast)")
    if tokenizer is None:
        notes.append(_WITHOUT_TOKENS)
    if listing.has_codes and listing.reads is None:
        notes.append(
            "codes were not compared with a model: give, in place of a list, a run's YAML file "
            "whose config.json is on this machine"
        )
    return notes


def _inspect_all(
    options: CheckOptions,
    listing: Listing,
    work: Callable[[Recording], Inspection],
    text: TextEncoder | None,
) -> tuple[dict[Recording, Inspection], bool]:
    """Return what is found in each recording, by now or at an earlier time, and whether any was
    inspected now."""
    tokens = text.fingerprint if text is not None else None
    found: dict[Recording, Inspection] = {}
    keys = {}
    with Ledger(options.ledger) as ledger:
        for recording in listing.all:
            known_by = (INSPECTION_VERSION, options.fast, tokens, recording.duration_sec)
            reads = (listing.reads,) if recording.has_codes else ()
            key = file_key(recording, *known_by, *reads)
            keys[recording] = key
            if key is not None and (kept := ledger.get(key)) is not None:
                duration_sec, rate_hz, num_channels, findings, digest = kept
                all_findings = [Finding(*each) for each in findings]
                found[recording] = Inspection(
                    recording.path, duration_sec, rate_hz, num_channels, all_findings, digest
                )
        missing = [recording for recording in listing.all if recording not in found]
        at_once = _FAST_AT_ONCE if options.fast else 1
        for done in do_all(
            work, missing, title="checking", workers=options.workers, at_once=at_once
        ):
            assert done.result is not None
            found[done.job] = done.result
            if (key := keys[done.job]) is not None:
                ledger.put(key, [*_facts(done.result), done.result.digest])
    return found, bool(missing)


def _inspect(
    recording: Recording,
    *,
    thorough: bool,
    tokenizer: Path | None,
    word_start: WordStart,
    reads: ReadCodes | None,
) -> Inspection:
    text = text_encoder(tokenizer, word_start) if tokenizer is not None else None
    return recording.inspect(thorough=thorough, text=text, reads=reads)

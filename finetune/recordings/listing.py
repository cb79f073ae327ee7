"""A command looks at the recordings of a JSONL, or of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache
from moshi.models.loaders import TEXT_TOKENIZER_NAME

from finetune.config import (
    DataArgs,
    ModelPaths,
    fill,
    is_configuration,
    list_problems,
    load_config,
    parse_sources,
)
from finetune.data import ReadCodes, Reading, Recording, list_together
from finetune.errors import UserError
from finetune.model import find_checkpoint, read_codes_of
from finetune.recordings.encoder import WordStart

_KEYS_OF_LIST = ("data.main_channel", "data.room_tone", "data.word_start")
"""What says how recordings are read, whatever is done with them."""


@dataclass
class Listing:
    """Recordings, unopened, and lines that name none."""

    recordings: list[Recording] = field(default_factory=list)
    evaluation: list[Recording] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Of lines: where, and what is wrong."""
    tokenizer: Path | None = None
    """The run's sentencepiece model, if it is on this machine."""
    main_channel: Literal["left", "right"] | None = None
    """The run's `data.main_channel`; a JSONL alone does not say."""
    word_start: WordStart = "auto"
    """See `data.word_start`."""
    reads: ReadCodes | None = None
    """What codes the run's model reads, where that is known and any recording is kept so."""

    @property
    def all(self) -> list[Recording]:
        """Each recording once."""
        return list(dict.fromkeys([*self.recordings, *self.evaluation]))

    @property
    def has_codes(self) -> bool:
        """Return whether any recording is kept as codes."""
        return any(recording.has_codes for recording in self.all)


def list_data(data: Path, overrides: Mapping[str, Any] | None = None) -> Listing:
    """Return what a JSONL (or another source) lists, or what a run's YAML file names.

    Args:
        overrides: keys of the run's configuration; of a list, those that say how it is read.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    listing = Listing()
    if is_configuration(data):
        args = load_config(data, overrides)
        train, evaluation = (Reading.of(args.data, training=each) for each in (True, False))
        _list(args.data.train_data, "data.train_data", train, listing.recordings, listing)
        if args.data.eval_data:
            _list(args.data.eval_data, "data.eval_data", evaluation, listing.evaluation, listing)
        listing.main_channel = args.data.main_channel
        listing.word_start = args.data.word_start
        listing.tokenizer = local_tokenizer(args.moshi_paths)
        if listing.has_codes:
            listing.reads = read_codes_of(args.moshi_paths)
    else:
        needs = f"a run's YAML file, and {data} is none"
        of_list = options_of_list(overrides or {}, needs)
        listing.word_start = of_list.word_start
        reading = Reading.of(of_list, training=False)
        _list(str(data), "--data", reading, listing.recordings, listing)
    return listing


def options_of_list(overrides: Mapping[str, Any], needs: str) -> DataArgs:
    """Return how a list is read that no run's YAML file names: with defaults, but for keys that
    the command line has.

    Args:
        needs: what other keys go with, for the message.

    Raises:
        UserError: a key of something else, or a wrong value.
    """
    for key in overrides:
        if key not in _KEYS_OF_LIST:
            raise UserError(
                f"--{key} is no option. Keys of a configuration go with {needs}; a list alone is "
                f"read with --{', --'.join(_KEYS_OF_LIST)}."
            )
    given = {key.removeprefix("data."): text for key, text in overrides.items()}
    found: DataArgs
    found, problems = fill(DataArgs, given)
    if problems:
        wrong = [f"data.{key}: {text}" for key, text in problems]
        raise UserError(list_problems("the command line", wrong))
    return found


def _list(spec: str, key: str, reading: Reading, found: list[Recording], listing: Listing) -> None:
    paths = [path for path, _ in parse_sources(spec, key)]
    for entries in list_together(paths, key, reading, listing.recordings):
        found += [entry.recording for entry in entries if entry.recording is not None]
        listing.problems += [(each.origin, each.problem) for each in entries if each.problem]


def local_tokenizer(paths: ModelPaths) -> Path | None:
    """Return the file of a run's tokenizer, unless it would have to be downloaded.

    Raises:
        UserError: it should be on this machine, and is not.
    """
    if paths.tokenizer_path:
        return Path(paths.tokenizer_path)
    if not paths.hf_repo_id or Path(paths.hf_repo_id).is_dir():
        return find_checkpoint(paths, with_weights=False).tokenizer
    known = try_to_load_from_cache(paths.hf_repo_id, TEXT_TOKENIZER_NAME)
    return Path(known) if isinstance(known, str) else None

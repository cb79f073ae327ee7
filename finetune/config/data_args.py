"""The `data` section of the configuration."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from finetune.config.must_exist import SOURCES
from finetune.config.values import PathsText, PathText
from ttt.options import HARMLESS, MEASURED


@dataclass
class DataArgs:
    train_data: Annotated[PathsText, SOURCES] = ""
    """Training data: `path[:weight],…`, each path a `.jsonl` file or a folder of them, or data of
    another layout, see [data.md](data.md#layouts). Batches mix the sources in proportion to the
    weights (default 1)."""

    eval_data: Annotated[PathsText, SOURCES, MEASURED] = ""
    """Evaluation data, written like `train_data`. Every evaluation reads all of it once; weights
    play no part."""

    shuffle: bool = False
    """Draw the segments of each source in a new random order every epoch; otherwise in the order
    of the files."""

    on_error: Literal["raise", "skip"] = "raise"
    """What a broken line, recording or transcript does: `raise` stops the run and names them all,
    `skip` leaves them out, warns and counts."""

    main_channel: Literal["left", "right"] = "left"
    """The channel of the recordings that is Moshi's; the other is the user's."""

    swap_channels: bool = False
    """Whether each training recording also comes from its other side, with Moshi in the user's
    place: the words of all other speakers become Moshi's. Their transcripts must hold the words of
    both. Evaluation data are not swapped."""

    room_tone: Annotated[float, Ge(-120), Le(-20)] | None = None
    """Level in dBFS (decibels of full scale), -70 for example, of a quiet noise in place of digital
    silence, which makes models fall silent; null: silence stays."""

    word_start: Literal["auto", "always", "never"] = "auto"
    """When the tokens of a word begin with the tokenizer's mark of a word's beginning. `auto`: not
    in scripts without spaces between words (Chinese, Japanese, Thai, …)."""

    num_workers: Annotated[int, Ge(0), Le(1024), HARMLESS] = 2
    """Background processes per rank that decode audio; 0 decodes in the training process."""

    prefetch_steps: Annotated[Annotated[int, Ge(0), Le(10_000)] | None, HARMLESS] = None
    """Steps whose batches are made ahead, in a thread of their own; 0 makes each when it is needed.
    null: 2 on a GPU, and 0 on a CPU, where the thread would only take the step's cores. Changes no
    number."""

    cache_dir: Annotated[PathText | None, HARMLESS] = None
    """Folder that keeps the codes of all segments for good, so that Mimi encodes each only once;
    null: they are kept in memory alone. Many runs and processes may share it, see
    [data.md](data.md)."""

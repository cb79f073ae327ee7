"""TTT learns in the segments that are longer than what lies between two of its updates, and in no
others: a run and its plan say in how many."""

from collections.abc import Iterator, Sequence

from finetune.config import TrainArgs
from finetune.data import FRAME_RATE_HZ, count_frames
from finetune.model import unused_ttt
from ttt import TTTArgs, TTTLMModel
from ttt.layers import layer_class
from ttt.registry import METHODS

FEW = 0.5
"""Below this share of segments in which TTT learns, a run is warned. What is left over at the ends
of recordings is often short, and no reason to."""


def num_learning(ttt: TTTArgs, segment_frames: Sequence[int]) -> int:
    """Return in how many segments of these lengths TTT makes an update that a frame can read."""
    return sum(frames > ttt.update_frames for frames in segment_frames)


def caution_of_updates(
    args: TrainArgs,
    segment_frames: Sequence[int] | None,
    segment_shares: Sequence[float] | None = None,
) -> str | None:
    """Return why TTT learns in no segment or in few, and what to change; None: in most it does,
    or there is no TTT.

    Args:
        segment_frames: of the recordings that train, as `TrainLoader` and `DataSet` have them;
            None: they are not known, and taken to be long enough.
        segment_shares: of all draws, as these have them as well; None: all are drawn as often.
    """
    if not args.ttt.enabled:
        return None
    every, most = args.ttt.update_frames, count_frames(args.duration_sec)
    segment_frames = segment_frames or [most]
    longest, learning = max(segment_frames), num_learning(args.ttt, segment_frames)
    count = len(segment_frames)
    shares = segment_shares or [1 / count] * count
    drawn = sum(
        share for share, frames in zip(shares, segment_frames, strict=True) if frames > every
    )
    if drawn >= FEW:
        return None
    option = METHODS[args.ttt.method].update_option
    update = f"{f'ttt.{option}' if option else 'an update'} ({every} frames)"
    reads_open_chunk = layer_class(args.ttt.method).reads_open_chunk
    effect = "carries nothing on" if reads_open_chunk else "never learns anything"
    if longest == most <= every:
        return (
            f"duration_sec is {args.duration_sec:g} ({most} frames), not longer than {update}: "
            f"TTT {effect}. Raise the one{' or lower the other' if option else ''}."
        )
    ways = [f"lower ttt.{option}"] if option else []
    ways += ["raise duration_sec"] if longest == most else []
    longer = "train on longer recordings"
    longer += ", with a longer duration_sec" if most <= every else ""
    remedy = _either([*ways, longer])
    if learning == 0:
        return (
            f"no segment is longer than {update}, the longest has {longest} "
            f"({longest / FRAME_RATE_HZ:.1f} s): TTT {effect}. {remedy}."
        )
    return (
        f"TTT {effect} in {count - learning} of {count} segments, {1 - drawn:.0%} of what is "
        f"drawn, as they are not longer than {update}. {remedy}."
    )


def cautions_of_ttt(
    args: TrainArgs,
    model: TTTLMModel,
    segment_frames: Sequence[int] | None,
    segment_shares: Sequence[float] | None,
) -> Iterator[str]:
    """Yield where TTT is left behind or can have nothing to do. Arguments: see
    `caution_of_updates`."""
    if caution := caution_of_unused_ttt(args):
        yield caution
    if not model.ttt_layers:
        return
    most, window = count_frames(args.duration_sec), model.context
    longest = max(segment_frames or [most])
    if caution := caution_of_updates(args, segment_frames, segment_shares):
        yield caution
    elif window is None or window >= longest:
        way = "raise duration_sec" if longest == most else "train on longer recordings"
        yield (
            f"attention sees the whole sequence ({longest} frames), so there is little "
            f"for TTT to remember. Sequences should be longer than the window: {way}."
        )


def caution_of_unused_ttt(args: TrainArgs) -> str | None:
    """Return that the TTT which the base's weights were trained with is left behind, and what takes
    it along; None: there is none beside them."""
    file = unused_ttt(args.moshi_paths)
    if file is None:
        return None
    trained_with = file.parent
    if trained_with.name == "consolidated":
        trained_with = trained_with.parent
    here = "new and untrained" if args.ttt.enabled else "off"
    return (
        f"{file} holds the TTT that these weights were trained with, and this run leaves it out: "
        f"its own is {here}. To train that TTT further, set moshi_paths.init_from: {trained_with}"
        + (" in place of moshi_paths.moshi_path." if args.moshi_paths.moshi_path else ".")
    )


def describe_ttt(args: TrainArgs, model: TTTLMModel, segment_frames: Sequence[int] | None) -> str:
    """Return a line on how often TTT learns, and what attention sees. Arguments: see
    `caution_of_updates`."""
    most = count_frames(args.duration_sec)
    attention = f"attention sees {model.context} frames of {most}"
    if args.ttt.attention_context is not None:
        attention += f", and {args.ttt.attention_context} in the layers that ttt names"
    if not model.ttt_layers:
        return f"TTT: off; {attention}"
    every = args.ttt.update_frames
    segment_frames = segment_frames or [most]
    fewest, updates = ((find(segment_frames) - 1) // every for find in (min, max))
    often = f"{'up to ' if fewest < updates else ''}{updates} update{'s' * (updates != 1)}"
    learning, where = num_learning(args.ttt, segment_frames), ""
    if 0 < learning < len(segment_frames):
        where = f", in {learning} of {len(segment_frames)} segments"
    layer = next(iter(model.ttt_layers.values()))
    return (
        f"TTT: {layer.describe()} in layers {', '.join(map(str, model.ttt_layers))}; "
        f"{often} a sequence, every {every} frames ({every / FRAME_RATE_HZ:.1f} s){where}; "
        f"{attention}"
    )


def _either(ways: Sequence[str]) -> str:
    """Return the beginning of a sentence."""
    text = ", or ".join(ways)
    return text[0].upper() + text[1:]

"""Processes that do one job for each of many recordings."""

from forked import Program

WITH_GARBAGE = """
import gc, av, numpy as np
from finetune.recordings.work import do_all

def job(number):
    gc.collect()
    return number

gc.disable()
resampler = av.AudioResampler(format="s16", layout="mono", rate=16000)
frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
frame.sample_rate = 24000
resampler.resample(frame)
garbage = [resampler]
garbage.append(garbage)
del garbage, resampler
print(sorted(done.result for done in do_all(job, range(4), title="", workers=2)))
"""


def test_workers_do_not_free_what_is_of_the_process_that_forked_them() -> None:
    """FFmpeg frees a filter by joining its threads, which a fork has not."""
    output, errors = Program(WITH_GARBAGE, stderr_apart=True).communicate(timeout=100)
    assert output == "[0, 1, 2, 3]\n", errors

"""This package keeps what is done already on the disk, so that no work is done twice."""

from finetune.kept.records import Records, read_records
from finetune.kept.whole import Kept, write_whole

__all__ = ["Kept", "Records", "read_records", "write_whole"]

"""Before `moshi` is imported: it compiles small functions, which costs more than the tests do."""

import os

os.environ["NO_TORCH_COMPILE"] = "1"

"""What the process that is forked for each start does once, behind its imports, for all of them."""

from __future__ import annotations

import gc

from ldm.modules.encoders.tokenizer import vocabulary

# Each start reads captions, and building the tokenizer takes it a tenth of a second.
vocabulary()

# No start looks for garbage in what is imported.
gc.collect()
gc.freeze()

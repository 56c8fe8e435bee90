"""Imported first: keeps to itself what torchao says while transformers imports it, wherever it is installed.

It reports the kernels that a machine without a GPU cannot load, and that it uses a name of torch which will change.
"""

from __future__ import annotations

import logging

_REMARKS = {"torchao": "Failed to load", "torch.utils._pytree": "is an Enum subclass"}

for _logger, _remark in _REMARKS.items():
    logging.getLogger(_logger).addFilter(lambda record, remark=_remark: remark not in record.getMessage())

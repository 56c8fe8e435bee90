"""Silences torchao while transformers imports it; has to be imported first.

torchao reports kernels that a machine without a GPU cannot load, and a name of torch that will change.
"""

from __future__ import annotations

import logging

_REMARKS = {"torchao": "Failed to load", "torch.utils._pytree": "is an Enum subclass"}

for _logger, _remark in _REMARKS.items():
    logging.getLogger(_logger).addFilter(lambda record, remark=_remark: remark not in record.getMessage())

"""The tables of metrics. A new one is a file beside this one, a row, and its settings if it has any."""

from svdllm.compression.math.metrics.asvd import ASVD, AsvdSettings
from svdllm.compression.math.metrics.fwsvd import FWSVD
from svdllm.compression.math.metrics.rows import LeftMetric, Method, Metric
from svdllm.compression.math.metrics.svd_llm import SVD_LLM
from svdllm.compression.math.metrics.two_sided import TWO_SIDED, TwoSidedSettings

SVD = Method(
    name="svd",
    summary="plain SVD of the weight, without data",
    source="Eckart and Young, 1936",
    right=lambda statistic, settings: None,
)
INPUT = Metric(
    name="input",
    summary="as it is, as in the paper",
    source="SVD-LLM, arXiv 2403.07378",
)

METHODS = {row.name: row for row in (SVD_LLM, SVD, ASVD, FWSVD)}
METRICS = {row.name: row for row in (INPUT, TWO_SIDED)}


class MethodSettings(AsvdSettings):
    """The settings of all rows of ``METHODS``."""


class MetricSettings(TwoSidedSettings):
    """The settings of all rows of ``METRICS``."""


__all__ = ["METHODS", "METRICS", "LeftMetric", "Method", "MethodSettings", "Metric", "MetricSettings"]

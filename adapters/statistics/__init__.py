"""What may be concluded from numbers of independent units: intervals, sequences that survive peeking, plans and checks.

Pure functions of numbers; nothing here knows experiments, a database or a clock. docs/statistics.md says what each
number means and when it does not hold.
"""

from adapters.statistics.arms import adjusted_confidence, comparison_confidence, thompson_weights
from adapters.statistics.covariates import AdjustedValues, adjust_for_covariate
from adapters.statistics.intervals import Interval, MeanEstimate, difference_interval, mean_interval
from adapters.statistics.mixtures import MIN_UNITS
from adapters.statistics.planning import duration_days, required_units
from adapters.statistics.preferences import Rating, bradley_terry
from adapters.statistics.ratios import ratio_values
from adapters.statistics.sample_ratio import SampleRatio, sample_ratio
from adapters.statistics.sequences import (
    DEFAULT_PLANNED_UNITS,
    difference_sequence,
    mean_sequence,
)

__all__ = [
    "DEFAULT_PLANNED_UNITS",
    "MIN_UNITS",
    "AdjustedValues",
    "Interval",
    "MeanEstimate",
    "Rating",
    "SampleRatio",
    "adjust_for_covariate",
    "adjusted_confidence",
    "bradley_terry",
    "comparison_confidence",
    "difference_interval",
    "difference_sequence",
    "duration_days",
    "mean_interval",
    "mean_sequence",
    "ratio_values",
    "required_units",
    "sample_ratio",
    "thompson_weights",
]

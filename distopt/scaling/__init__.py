"""Training in 16 bits: a gradient scale for every residual branch, and what stays in float32."""

from distopt.scaling.policy import HeadroomPolicy as HeadroomPolicy
from distopt.scaling.policy import PaperPolicy as PaperPolicy
from distopt.scaling.policy import ScalePolicy as ScalePolicy
from distopt.scaling.precision import in_float32 as in_float32
from distopt.scaling.precision import to_16bit as to_16bit
from distopt.scaling.resblock import ResblockScaler as ResblockScaler
from distopt.scaling.stats import BlockFigures as BlockFigures
from distopt.scaling.stats import ScalerStats as ScalerStats

"""Plain, correct normalization layers: the bases of the mutants in `tests.support.mutants`.

Each module contains one layer and imports only torch, so its source can be changed and run alone.
Each layer is called as Norm(num_features=C, num_dims=D, **arguments), for D = 2 to 5.
16-bit input is normalized in float32 and returned in its dtype.
"""

from tests.support.plain_norms.batch_norm import BatchNorm
from tests.support.plain_norms.batch_renorm import BatchRenorm
from tests.support.plain_norms.ghost_batch_norm import GhostBatchNorm
from tests.support.plain_norms.group_norm import GroupNorm
from tests.support.plain_norms.instance_norm import InstanceNorm
from tests.support.plain_norms.layer_norm import LayerNorm
from tests.support.plain_norms.manual_batch_norm import ManualBatchNorm
from tests.support.plain_norms.rms_norm import RMSNorm

BASES = {
    "batch_norm": BatchNorm,
    "manual_batch_norm": ManualBatchNorm,
    "layer_norm": LayerNorm,
    "group_norm": GroupNorm,
    "instance_norm": InstanceNorm,
    "rms_norm": RMSNorm,
    "ghost_batch_norm": GhostBatchNorm,
    "batch_renorm": BatchRenorm,
}

"""The shallow network of IMPALA (Espeholt et al. 2018, figure 3 left)."""

from shared.networks.convolutional import ConvolutionTrunk, ImageNetwork, Trunk, smallest_side
from shared.networks.leaves import Picture

_LAYERS = ((16, 8, 4), (32, 4, 2))


class ImpalaShallowNetwork(ImageNetwork):
    """Convolutions 16·8×8/4, 32·4×4/2 and 256 dense units per image."""

    name = "impala_shallow"
    smallest = smallest_side(_LAYERS)

    def build_trunk(self, shape: Picture, pixel_scale: float) -> Trunk:
        """See `ImageNetwork`."""
        return ConvolutionTrunk(shape, pixel_scale, layers=_LAYERS, dense=256)

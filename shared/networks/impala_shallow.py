"""The shallow network of IMPALA (Espeholt et al. 2018, figure 3 left)."""

from shared.networks.convolutional import ConvolutionTrunk, ImageNetwork, Trunk
from shared.networks.pictures import SHALLOW_LAYERS, Picture, smallest_side


class ImpalaShallowNetwork(ImageNetwork):
    """Convolutions 16·8×8/4, 32·4×4/2 and 256 dense units per image."""

    name = "impala_shallow"
    smallest = smallest_side(SHALLOW_LAYERS)

    def build_trunk(self, shape: Picture, pixel_scale: float) -> Trunk:
        """See `ImageNetwork`."""
        return ConvolutionTrunk(shape, pixel_scale, layers=SHALLOW_LAYERS, dense=256)

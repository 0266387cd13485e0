"""The network of Mnih et al. 2015 (Nature 518), as R2D2 and many others use it."""

from shared.networks.convolutional import ConvolutionTrunk, ImageNetwork, Trunk
from shared.networks.pictures import Picture, smallest_side

_LAYERS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))


class NatureNetwork(ImageNetwork):
    """Convolutions 32·8×8/4, 64·4×4/2, 64·3×3/1 and 512 dense units per image."""

    name = "nature"
    smallest = smallest_side(_LAYERS)

    def build_trunk(self, shape: Picture, pixel_scale: float) -> Trunk:
        """See `ImageNetwork`."""
        return ConvolutionTrunk(shape, pixel_scale, layers=_LAYERS, dense=512)

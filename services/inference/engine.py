"""A run's network, and the batching in front of it."""

from functools import partial

import torch
from torch import Tensor

from services.inference.batcher import Batcher
from services.inference.config import InferenceConfig
from services.inference.dispatcher import Dispatcher
from services.inference.metrics import InferenceMetrics
from services.inference.model import Answers, Model, PackedBatch
from services.inference.model_thread import ModelThread
from services.inference.staging import StagingPool
from shared.bus.weights import Weights
from shared.checkpoints import weights_from_bytes
from shared.errors import RunError
from shared.networks.build import build_network
from shared.networks.interface import Network
from shared.networks.precision import resolve_device
from shared.runtime import in_thread
from shared.specs import RunSpec
from shared.wire.chunks import StateShapes

NO_WEIGHTS = "weights"


class Engine:
    """What there is once the run's spec is known; no batch leaves its dispatcher before the first `load`."""

    def __init__(
        self,
        spec: RunSpec,
        model: Model,
        shapes: StateShapes,
        dispatcher: Dispatcher,
        thread: ModelThread,
        *,
        frames_in_place: bool,
    ) -> None:
        self.spec = spec
        self.frames_in_place = frames_in_place  # for a policy on the CPU groups stack their frames
        self.state_shapes = shapes
        self.dispatcher = dispatcher
        self.weights_version = 0  # 0: none yet
        self.weights_update = 0
        self._model = model
        self._thread = thread
        self._network_hash = spec.network_hash
        dispatcher.block(NO_WEIGHTS)

    @staticmethod
    async def built(
        spec: RunSpec, config: InferenceConfig, *, thread: ModelThread, metrics: InferenceMetrics
    ) -> "Engine":
        """Raises ConfigurationError for a network that there is not or that does not fit the spaces, and for
        CUDA graphs on another device.
        """
        device = resolve_device(config.device)
        in_place = device.type == "cpu" and spec.network.frame_stack > 1
        model, shapes = await thread.call(partial(_build, spec, config, device, in_place))

        def run(batch: PackedBatch) -> Answers:
            with metrics.model:
                return model.run(batch)

        dispatcher = Dispatcher(
            run=lambda batch: thread.call(partial(run, batch), is_quick=model.is_quick),
            pool=StagingPool(
                spec.environment,
                rows=config.max_batch_size,
                pinned=device.type == "cuda",
                in_place=in_place,
            ),
            batcher=Batcher(max_batch_size=config.max_batch_size, max_batch_delay=config.max_batch_delay),
            metrics=metrics,
        )
        return Engine(spec, model, shapes, dispatcher, thread, frames_in_place=in_place)

    async def load(self, weights: Weights) -> None:
        """Swaps the weights between two batches. Raises RunError when they are not of this run's network."""
        if weights.network_hash != self._network_hash:
            raise RunError(f"weights of network {weights.network_hash}, this run's is {self._network_hash}")
        tensors = await in_thread(partial(self._checked, weights))
        swap = partial(self._model.load, tensors, version=weights.version, update=weights.update)
        await self._thread.call(swap)
        self.weights_version, self.weights_update = weights.version, weights.update
        self.dispatcher.unblock(NO_WEIGHTS)

    def _checked(self, weights: Weights) -> dict[str, Tensor]:
        tensors = weights_from_bytes(weights.data)
        self._model.check(tensors)
        return tensors


def state_shapes(network: Network) -> StateShapes:
    """Shape of one environment's value and dtype of each leaf of the recurrent state."""
    leaves = network.initial_state(1)
    return [(tuple(leaf.shape[1:]), str(leaf.dtype).removeprefix("torch.")) for leaf in leaves]


def _build(
    spec: RunSpec, config: InferenceConfig, device: torch.device, frames_in_place: bool
) -> tuple[Model, StateShapes]:
    network = build_network(spec)
    model = Model(
        spec,
        network,
        device=device,
        precision=config.precision,
        seed=config.seed,
        cuda_graphs=config.cuda_graphs,
        frames_in_place=frames_in_place,
    )
    return model, state_shapes(network)

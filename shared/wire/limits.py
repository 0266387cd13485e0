"""Sizes and names that both wire formats accept; larger ones are refused before memory is set aside."""

MIB = 2**20

DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64"),
)
"""Numpy names of the dtypes that travel, little-endian; a bool is one byte, 0 or 1."""

MAX_MESSAGE_BYTES = 64 * MIB
"""Of one gRPC message, and of all arrays of one chunk; nats-server accepts no larger message either."""

MAX_ID_CHARACTERS = 64  # run ids and stream ids, ASCII
MAX_ACTOR_ID_CHARACTERS = 128
MAX_TASK_CHARACTERS = 128
MAX_LEAF_NAME_CHARACTERS = 128
MAX_LEAVES = 256
MAX_DIMENSIONS = 8  # of one environment's value
MAX_GROUP_SIZE = 65_536  # B, environments of one stream
STEP_BYTES_BESIDE_OBSERVATION = 4 + 3  # of one environment in a Step: reward and three flags
MAX_VALUES = 2**20  # of a Discrete space, and of the actions

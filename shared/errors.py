"""The errors that leave a service or reach another module, with those of single services beside them.

SeedrlError
├── UserError            a person's mistake: one line on stderr, exit status 2
│   ├── ConfigurationError   an option, preset, environment name or value
│   ├── UnsupportedEnvironment    an unknown environment or an unsupported space
│   └── RunError             a run directory or a run that is not what was asked for
├── ConnectionFailed     a peer that could not be reached in time: one line, exit status 3
│   └── NoStream             (shared.bus) nobody keeps what is published
├── Refused              a peer said no for good (token, spaces, protocol): one line, exit status 4
├── ProtocolError        a message that breaks a protocol: ends one stream, or one request to replay
│   └── Refusal              (services.inference) with the status that the stream ends with
├── ChunkError           bytes that are no chunk, or a chunk that does not fit the run
├── QueueFull            the work queue takes no more for now (backpressure)
├── TrainingDiverged     a loss or gradient that is not finite: one line, exit status 5
├── EnvironmentCrashed, EnvironmentHangs    (services.actor) one line, exit status 1
│   └── EnvironmentMistaken  what it returns contradicts itself from the first step: exit status 2
└── ServiceFailed        (services.local) a child's last words and exit status

What a module raises for itself to catch, and never lets out, is no SeedrlError.
"""


class SeedrlError(Exception):
    """Base of all errors raised on purpose; its text is one line that names what was wrong."""

    exit_status = 1


class UserError(SeedrlError):
    """A person's mistake."""

    exit_status = 2


class ConfigurationError(UserError):
    """An option, preset, environment variable or value that cannot be used."""


class UnsupportedEnvironment(UserError):
    """An unknown environment, or one whose spaces or autoreset are not supported."""


class RunError(UserError):
    """A run directory, checkpoint or run id that is not what was asked for."""


class ConnectionFailed(SeedrlError):
    """A peer could not be reached within the time a command waits."""

    exit_status = 3


class Refused(SeedrlError):
    """A peer refused for good: wrong token, spaces that do not fit, wrong protocol version."""

    exit_status = 4


class ProtocolError(SeedrlError):
    """A message that breaks the protocol of inference or replay; it ends what it belongs to, nothing else."""


class ChunkError(SeedrlError):
    """Bytes that are no chunk, or a chunk that does not fit the run."""


class QueueFull(SeedrlError):
    """The work queue takes no more for now; publish again later."""


class TrainingDiverged(SeedrlError):
    """A loss or gradient is not finite; nothing was saved after it."""

    exit_status = 5

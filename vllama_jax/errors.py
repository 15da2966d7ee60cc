"""What a user's input can cause. Every message stands alone: it says what is wrong and what to do."""


class VllamaError(Exception):
    """Base of every error that bad input causes; the command line prints it as one line and exits with 1."""


class MediaError(VllamaError):
    """A video, sound or picture that cannot be used."""


class CheckpointError(VllamaError):
    """Weights, a model directory or a run directory that cannot be used."""


class ConfigError(VllamaError):
    """An option or a config field that does not fit the model or the machine."""


class ArrayError(VllamaError):
    """An array whose shape or dtype a method of the network does not take."""


class DataError(VllamaError):
    """Annotations or records that cannot be used."""

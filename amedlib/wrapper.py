"""What stands around a denoiser passes on all that it does not change."""


class Wrapper:
    """A denoiser around another: its attributes are those of the inner one, and so are its calls.

    Attributes:
        denoiser: the inner one, a callable as in ``amedlib.sample``.
    """

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def __getattr__(self, name):
        # A copy or an unpickled one asks before there is a denoiser.
        if name == "denoiser" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.denoiser, name)

    def __call__(self, x, t, labels=None, **options):
        return self.denoiser(x, t, labels, **options)


def unwrapped(denoiser):
    """The innermost denoiser."""
    while isinstance(denoiser, Wrapper):
        denoiser = denoiser.denoiser
    return denoiser

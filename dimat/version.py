"""The version, in a module that low floors may import without the package's names."""

__version__ = "0.1.0.dev0"

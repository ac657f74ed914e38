"""The version, in a module of its own: what lies low may name it without importing the package's names."""

__version__ = "0.1.0.dev0"

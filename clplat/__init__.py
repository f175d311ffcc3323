"""clplat: continual learning on sequences. Import what you need from its modules; nothing heavy loads here."""

__version__ = "0.2.0"

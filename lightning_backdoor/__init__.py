"""Training-time defence against backdoors, as drop-in callbacks for PyTorch Lightning."""

__version__ = "0.1.0"

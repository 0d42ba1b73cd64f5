"""Small instances of the architectures of transformers, timm and torchvision, and one step of each measured."""

try:
    from abyssal.models.torchvision import import_torchvision
except ImportError:  # as an older checkout, to compare with, has it
    from abyssal._torchvision import import_torchvision

import_torchvision()  # before timm and transformers import it

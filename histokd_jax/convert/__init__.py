"""The authors' PyTorch checkpoints as models of this library, and back."""

"""Image encoders: vision transformers and ResNets on NHWC images, described by frozen specifications."""

"""Images as arrays: standardisation, colour spaces, stain normalisation and augmentation, all inside `jit`.

Everywhere in this package an image is channel-last RGB on the scale 0..255, uint8 or float, of any height and width.

pixels           uint8 <-> float, ImageNet standardisation
colour, density  HSV and CIELAB; optical density and haematoxylin-eosin-DAB
macenko, reinhard, vahadane   fit(pixels, mask) -> params; transform(images, source, target) -> images
stains, quantiles             what they share
stain_normaliser one of the three with its target, and its JSON file
geometry, photometric, vectors      arithmetic of augmentation, given the drawn numbers
steps, steps_colour, steps_vector   how the numbers of one step are drawn
augment, presets pipelines of steps over a batch, seeded by (key, example)
"""

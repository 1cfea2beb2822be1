"""Numbers that say how good a model is.

`pixels` and `levels` need the model and its data alone, `ood` other images beside. FID, KID
and the inception score see images through the Inception-2015 network (`inception`) with weights
that the user has fetched (`weights`); `summary` is what is kept of a set of images, `reference`
that of the data. `frechet` and `scores` are the maths.
"""

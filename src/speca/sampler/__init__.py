"""What a sampler does with the outputs it is given: the linear response of schedulers and of sampler functions."""

"""Every choice a person makes: the model, the training, presets of both, and files of settings. Imports no torch."""

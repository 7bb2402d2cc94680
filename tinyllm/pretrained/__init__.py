"""Models in other people's formats, as configs and weights of ours and back; no module here knows SimpleLLM itself."""

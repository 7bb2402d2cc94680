"""Adapters to other people's libraries. Each imports its library when it is first used."""

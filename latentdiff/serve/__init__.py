"""The server: one queue in front of the models, a page, and protocols of existing clients.

engine   the queue: fair between clients, compatible images in one batch
models   what may be asked for by name, and what of it is in memory
app      the application: who may ask, how much, and what errors look like
native   the page's own protocol
a1111    that of A1111's clients; a1111_fields, a1111_names: what they say and may name
"""

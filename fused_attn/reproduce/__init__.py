"""The tables and figures of the papers, by one command: ``fused-attn reproduce``.

``tables.yaml`` says what each is made of, :mod:`.tables` reads it, :mod:`.rows` trains or counts what is missing,
:mod:`.report` writes table and figure from the folders of the runs, :mod:`.command` is the command.
"""

"""Models: diffusers checkpoints as policies, one small file per family.

Lowest first: `folder`, `components` and `digests` (a checkpoint on disk), `text`, `policy`,
`latents` and the families, `adapters`, `switches`, `export`, `opening`.

Left out: the models of rewards (`treegrpo/rewards/`).
"""

"""How prompts get into a backbone. Knows neither the tuner layer nor its configuration.

A *site* is one self-attention module understood: its norm, its projections, its heads, and the *way in* by which it
takes prompts. There are three ways in, with one interface ([`~e2vpt_peft.attention.prefix.WayIn`]):

- `interface`: transformers' attention interface, for almost every model of transformers;
- `interception`: the torch functions that an attention calls, where it has no such interface;
- `tokens`: tokens that are inserted in front of a stack of layers, for shallow visual prompts.

`architectures` is the table of what is known, `targets` says which modules are adapted by default, `prefix` what a
prefix is, and `mask` makes room for it in attention masks.
"""

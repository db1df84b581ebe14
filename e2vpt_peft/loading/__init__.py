"""What may be put into a model, new or saved, and under which names.

A saved adapter passes three checks, each before anything is changed:

1. `E2VPTConfig.from_pretrained` reads the configuration, and has the file beside it compared with what that says
   ([`~e2vpt_peft.adapter_file`]): whole, no pickle, of the right shapes, finite.
2. `E2VPTModel` is about to put the adapter into the model: [`compatibility`] compares its name, its targets and the
   backbone that it was made for with the model. A new adapter passes here, too.
3. PEFT has read the weights and is about to load them: [`former_names`] renames those that were saved under a former
   layout of transformers, and [`compatibility`] compares them with the model, tensor by tensor.
"""

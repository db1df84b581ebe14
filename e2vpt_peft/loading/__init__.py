"""What may be put into a model, new or saved, and under which names.

A saved adapter passes these checks, each before anything is changed:

1. `E2VPTConfig.from_pretrained` reads the configuration, and has the file beside it compared with what that says
   ([`~e2vpt_peft.adapter_file`]): whole, no pickle, of the right shapes, finite. It remembers the file's header.
2. `E2VPTModel` is about to put the adapter into the model: [`adapter_name`], and [`compatibility`] of targets,
   `modules_to_save` and backbone. A new adapter passes here, too. [`saved_prompts`] and [`saved_heads`] compare the
   header with what the adapter is going to have in the model.
3. PEFT has read the weights and is about to load them: [`saved_prompts`] and [`saved_heads`] compare them with what
   the adapter has, tensor by tensor. Prompts may have been saved under other names, which [`layer_names`] finds, with
   those of a former layout of transformers from [`former_names`].
"""

"""A machine that executes PTX on the CPU, with numpy: what the compiled kernels do, seen without a GPU.

Read it in this order:

1. `text` and `operands`: PTX text to instructions, scopes, variables and calls resolved.
2. `flow`: basic blocks, and which registers live from one to the next.
3. `translate`: a block to one Python function, each instruction a call of what the families below define.
   `integers`, `floats`, `convert`, `moves` compute; `memory`, `atomics` reach memory; `warp` exchanges between lanes;
   `matrix` and `warpgroup` multiply; `sync` orders; `copies` moves data asynchronously.
4. `state`: what the cooperative thread arrays (CTAs) of a launch hold while they run. `regions` is global memory,
   `shared` shared memory, `order` the happens-before relation between warps, `flights` what is asynchronous.
5. `schedule`: which threads run next, where they part ways and meet. `launch.run` is the whole: PTX text, a kernel's
   name, a grid, a block and arguments, from wherever they come. `driver` puts it behind Triton's launchers, `cuda`
   behind those of the extension's CUDA C++.
6. `trials` is what runs on it, `sample` what of that `make test` runs, `alike` what need not run twice, `emulate` the
   command that runs all. `faults` and `plant` take statements out of compiled kernels, `trace` shows where that
   changes nothing.

A register of all threads is one array [CTAs or 1, threads or 1], so a value that threads share is kept once. Whatever
a GPU would do wrongly without a word is a finding (`findings`); an instruction or form that is not defined here raises
`Unsupported` with its line.
"""

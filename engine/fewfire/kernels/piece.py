"""How Numba compiles the pieces of kernels, which are inlined wherever they are called.

Numba would optimise each piece, make machine code of it, and optimise what it has made of the piece once more inside
every caller. Only the callers' code is ever run, so a piece stays as Numba lowers it and is optimised where it ends up
(perf/LOG.md, "what is compiled for nothing"). A Numba whose inside looks different compiles pieces as it does any other
function: they cost more then, and do the same.
"""

from typing import Any

from numba.core.compiler import Compiler, CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import NativeLowering

try:
    from numba._dynfunc import make_function
    from numba.core.codegen import JITCodeLibrary
except ImportError:
    PieceCompiler: type[CompilerBase] = Compiler
else:

    class _PieceLibrary(JITCodeLibrary):
        """LLVM code that is there to be linked into that of callers."""

        def _optimize_final_module(self) -> None:
            pass

        def _finalize_final_module(self) -> None:
            self._finalized = True

    @register_pass(mutates_CFG=True, analysis_only=False)
    class _PieceLowering(NativeLowering):
        """Registers a function with its LLVM code alone; Numba wants a function object to know it by."""

        _name = "piece_lowering"

        def run_pass(self, state: Any) -> bool:
            state.library = _PieceLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
            state.flags.no_compile = True
            super().run_pass(state)
            lowered, library = state.cr, state.library
            module = lowered.fndesc.lookup_module()
            known = make_function(module, state.func_id.func_name, "", 0, lowered.env, (library,))
            state.targetctx.insert_user_function(known, lowered.fndesc, [library])
            state.cr = lowered._replace(cfunc=known)
            return True

    class _PieceCompiler(CompilerBase):
        """Numba's own pipeline, but for the lowering."""

        def define_pipelines(self) -> list[PassManager]:
            manager = PassManager("piece")
            for made, does in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
                manager.add_pass(_PieceLowering if made is NativeLowering else made, does)
            manager.finalize()
            return [manager]

    PieceCompiler = _PieceCompiler

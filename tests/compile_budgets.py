"""Budgets of the compile-only gate, per Triton version: registers, spilled bytes a thread, shared bytes.

Figures of `python tests/compile_only.py`: registers with a margin of 8 (the limit is 255), spills rounded up to 64.
What spills: float32, sm_100, and on sm_90 linear_logps_bwd_kernel and frozen_head_fwd_kernel with everything on. Of
the kernels of `sparse` rows linear_logps_bwd_kernel spills, and on gfx942 draw_kernel with everything on. Kernels that
are not named must fit 192 registers, 4 KiB of shared memory, and spill nothing. Those of draw_kernel and
non_target_kernel are of Triton 3.7 in both.
"""

# Bytes of shared memory that a block may ask for.
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
SHARED_LIMIT |= {"gfx90a": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536}

BUDGETS: dict[str, dict[str, dict[str, tuple[int, int, int]]]] = {
    "3.6": {
        "sm_80 bf16 plain": {
            "linear_logps_fwd_kernel": (215, 0, 65536),
            "linear_logps_bwd_kernel": (224, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
        },
        "sm_80 bf16 everything": {
            "linear_logps_fwd_kernel": (223, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
            "combine_kernel": (210, 0, 1024),
            "frozen_head_fwd_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 plain": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 everything": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 704, 65536),
            "combine_kernel": (210, 0, 1024),
            "frozen_head_fwd_kernel": (255, 64, 65536),
        },
        "sm_86 bf16 plain": {
            "linear_logps_fwd_kernel": (188, 0, 32768),
            "linear_logps_bwd_kernel": (225, 0, 32768),
            "frozen_head_fwd_kernel": (249, 0, 32768),
        },
        "sm_86 bf16 everything": {
            "linear_logps_fwd_kernel": (224, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
            "combine_kernel": (210, 0, 1024),
            "frozen_head_fwd_kernel": (255, 0, 32768),
        },
        "sm_86 fp32 plain": {
            "linear_logps_fwd_kernel": (136, 0, 24576),
            "linear_logps_bwd_kernel": (136, 0, 24576),
            "frozen_head_fwd_kernel": (136, 0, 24576),
        },
        "sm_86 fp32 everything": {
            "linear_logps_fwd_kernel": (136, 0, 24576),
            "linear_logps_bwd_kernel": (255, 0, 24576),
            "combine_kernel": (210, 0, 1024),
            "frozen_head_fwd_kernel": (198, 0, 24576),
        },
        "sm_90 bf16 plain": {
            "linear_logps_fwd_kernel": (251, 0, 197152),
            "linear_logps_bwd_kernel": (255, 0, 229408),
            "frozen_head_fwd_kernel": (255, 0, 196640),
        },
        "sm_90 bf16 everything": {
            "linear_logps_fwd_kernel": (255, 0, 208928),
            "linear_logps_bwd_kernel": (255, 128, 229408),
            "combine_kernel": (214, 0, 1024),
            "frozen_head_fwd_kernel": (255, 256, 196640),
        },
        "sm_90 fp32 plain": {
            "linear_logps_fwd_kernel": (250, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
            "frozen_head_fwd_kernel": (243, 0, 65536),
        },
        "sm_90 fp32 everything": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 768, 65536),
            "combine_kernel": (214, 0, 1024),
            "frozen_head_fwd_kernel": (255, 64, 65536),
        },
        "sm_100 bf16 plain": {
            "linear_logps_fwd_kernel": (255, 0, 197680),
            "linear_logps_bwd_kernel": (255, 0, 204848),
            "frozen_head_fwd_kernel": (255, 0, 196656),
        },
        "sm_100 bf16 everything": {
            "linear_logps_fwd_kernel": (255, 0, 196656),
            "linear_logps_bwd_kernel": (255, 128, 196656),
            "frozen_head_fwd_kernel": (255, 384, 196656),
        },
        "sm_100 fp32 plain": {
            "linear_logps_fwd_kernel": (192, 0, 65536),
            "linear_logps_bwd_kernel": (201, 0, 65536),
            "frozen_head_fwd_kernel": (254, 0, 65536),
        },
        "sm_100 fp32 everything": {
            "linear_logps_fwd_kernel": (248, 0, 65536),
            "linear_logps_bwd_kernel": (255, 832, 65536),
            "frozen_head_fwd_kernel": (255, 64, 65536),
        },
        "gfx942 bf16 plain": {
            "linear_logps_fwd_kernel": (138, 0, 32768),
            "linear_logps_bwd_kernel": (140, 0, 32768),
            "frozen_head_fwd_kernel": (155, 0, 32768),
            "derivative_kernel": (66, 0, 8192),
        },
        "gfx942 bf16 everything": {
            "linear_logps_fwd_kernel": (173, 0, 32768),
            "linear_logps_bwd_kernel": (262, 0, 65536),
            "frozen_head_fwd_kernel": (175, 0, 32768),
            "derivative_kernel": (66, 0, 8192),
        },
        "gfx942 fp32 plain": {
            "linear_logps_fwd_kernel": (172, 0, 32768),
            "linear_logps_bwd_kernel": (170, 0, 32768),
            "frozen_head_fwd_kernel": (183, 0, 32768),
        },
        "gfx942 fp32 everything": {
            "linear_logps_fwd_kernel": (186, 0, 32768),
            "linear_logps_bwd_kernel": (264, 64, 65536),
            "frozen_head_fwd_kernel": (197, 0, 32768),
        },
        "sm_90 bf16 plain unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
            "frozen_head_fwd_kernel": (255, 64, 32768),
        },
        "sm_90 bf16 everything unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
            "combine_kernel": (214, 0, 1024),
            "frozen_head_fwd_kernel": (255, 128, 32768),
        },
        "sm_100 bf16 plain unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 65552),
            "linear_logps_bwd_kernel": (255, 128, 65552),
            "frozen_head_fwd_kernel": (255, 128, 65552),
        },
        "sm_100 bf16 everything unaligned": {
            "linear_logps_fwd_kernel": (252, 0, 65552),
            "linear_logps_bwd_kernel": (255, 128, 65552),
            "frozen_head_fwd_kernel": (255, 192, 65552),
        },
        "sm_90 fp16 plain": {
            "linear_logps_fwd_kernel": (251, 0, 197152),
            "linear_logps_bwd_kernel": (255, 0, 229408),
            "frozen_head_fwd_kernel": (255, 0, 196640),
        },
        "sm_80 bf16 plain sparse": {
            "draw_kernel": (114, 0, 40960),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (169, 0, 49152),
            "row_limited_gemm_kernel": (194, 0, 65536),
            "linear_logps_bwd_kernel": (229, 0, 65536),
        },
        "sm_80 bf16 everything sparse": {
            "draw_kernel": (132, 0, 40960),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (175, 0, 49152),
            "row_limited_gemm_kernel": (194, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "sm_90 bf16 plain sparse": {
            "draw_kernel": (224, 0, 73728),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (243, 0, 122880),
            "row_limited_gemm_kernel": (202, 0, 98304),
            "linear_logps_bwd_kernel": (255, 0, 229408),
        },
        "sm_90 bf16 everything sparse": {
            "draw_kernel": (225, 0, 73728),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (244, 0, 122880),
            "row_limited_gemm_kernel": (202, 0, 98304),
            "linear_logps_bwd_kernel": (255, 64, 229408),
        },
        "sm_100 bf16 plain sparse": {
            "draw_kernel": (191, 0, 73728),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (232, 0, 122896),
            "row_limited_gemm_kernel": (232, 0, 98320),
            "linear_logps_bwd_kernel": (255, 0, 204848),
        },
        "sm_100 bf16 everything sparse": {
            "draw_kernel": (199, 0, 73728),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (210, 0, 122896),
            "row_limited_gemm_kernel": (232, 0, 98320),
            "linear_logps_bwd_kernel": (255, 128, 196656),
        },
        "gfx942 bf16 plain sparse": {
            "draw_kernel": (247, 0, 40960),
            "visit_kernel": (83, 0, 49152),
            "row_limited_gemm_kernel": (114, 0, 32768),
            "linear_logps_bwd_kernel": (138, 0, 32768),
            "weighted_rows_kernel": (62, 0, 8192),
        },
        "gfx942 bf16 everything sparse": {
            "draw_kernel": (256, 128, 40960),
            "visit_kernel": (86, 0, 49152),
            "row_limited_gemm_kernel": (114, 0, 32768),
            "linear_logps_bwd_kernel": (256, 0, 65536),
            "weighted_rows_kernel": (62, 0, 8192),
        },
        "sm_90 fp32 everything sparse": {
            "draw_kernel": (167, 0, 40960),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (180, 0, 49152),
            "row_limited_gemm_kernel": (202, 0, 65536),
            "linear_logps_bwd_kernel": (255, 384, 65536),
        },
    },
    "3.7": {
        "sm_80 bf16 plain": {
            "linear_logps_fwd_kernel": (214, 0, 65536),
            "linear_logps_bwd_kernel": (223, 0, 65536),
            "frozen_head_fwd_kernel": (253, 0, 65536),
        },
        "sm_80 bf16 everything": {
            "linear_logps_fwd_kernel": (221, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 plain": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 everything": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 384, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
        },
        "sm_86 bf16 plain": {
            "linear_logps_fwd_kernel": (192, 0, 32768),
            "linear_logps_bwd_kernel": (219, 0, 32768),
            "frozen_head_fwd_kernel": (241, 0, 32768),
        },
        "sm_86 bf16 everything": {
            "linear_logps_fwd_kernel": (222, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
            "frozen_head_fwd_kernel": (255, 0, 32768),
        },
        "sm_86 fp32 plain": {
            "linear_logps_fwd_kernel": (136, 0, 24576),
            "linear_logps_bwd_kernel": (136, 0, 24576),
            "frozen_head_fwd_kernel": (136, 0, 24576),
        },
        "sm_86 fp32 everything": {
            "linear_logps_fwd_kernel": (136, 0, 24576),
            "linear_logps_bwd_kernel": (248, 0, 24576),
            "frozen_head_fwd_kernel": (136, 0, 24576),
        },
        "sm_90 bf16 plain": {
            "linear_logps_fwd_kernel": (252, 0, 197152),
            "linear_logps_bwd_kernel": (255, 0, 229408),
            "frozen_head_fwd_kernel": (255, 0, 196640),
        },
        "sm_90 bf16 everything": {
            "linear_logps_fwd_kernel": (255, 0, 208928),
            "linear_logps_bwd_kernel": (255, 128, 229408),
            "frozen_head_fwd_kernel": (255, 384, 196640),
        },
        "sm_90 fp32 plain": {
            "linear_logps_fwd_kernel": (250, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
        },
        "sm_90 fp32 everything": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 384, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
        },
        "sm_100 bf16 plain": {
            "linear_logps_fwd_kernel": (255, 320, 197680),
            "linear_logps_bwd_kernel": (255, 256, 204848),
            "frozen_head_fwd_kernel": (255, 596, 196656),
        },
        "sm_100 bf16 everything": {
            "linear_logps_fwd_kernel": (255, 384, 196656),
            "linear_logps_bwd_kernel": (255, 512, 196656),
            "frozen_head_fwd_kernel": (255, 1344, 196656),
        },
        "sm_100 fp32 plain": {
            "linear_logps_fwd_kernel": (210, 0, 65536),
            "linear_logps_bwd_kernel": (178, 0, 65536),
            "frozen_head_fwd_kernel": (208, 0, 65536),
        },
        "sm_100 fp32 everything": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "gather_rows_kernel": (72, 64, 1024),
            "linear_logps_bwd_kernel": (255, 512, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
        },
        "gfx942 bf16 plain": {
            "linear_logps_fwd_kernel": (162, 0, 32768),
            "linear_logps_bwd_kernel": (168, 0, 32768),
            "frozen_head_fwd_kernel": (179, 0, 32768),
            "derivative_kernel": (46, 0, 8192),
        },
        "gfx942 bf16 everything": {
            "linear_logps_fwd_kernel": (174, 0, 32768),
            "linear_logps_bwd_kernel": (216, 0, 65536),
            "frozen_head_fwd_kernel": (199, 0, 32768),
            "derivative_kernel": (51, 0, 8192),
        },
        "gfx942 fp32 plain": {
            "linear_logps_fwd_kernel": (172, 0, 32768),
            "linear_logps_bwd_kernel": (174, 0, 32768),
            "frozen_head_fwd_kernel": (195, 0, 32768),
        },
        "gfx942 fp32 everything": {
            "linear_logps_fwd_kernel": (204, 0, 32768),
            "linear_logps_bwd_kernel": (226, 0, 65536),
            "frozen_head_fwd_kernel": (215, 0, 32768),
        },
        "sm_90 bf16 plain unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
            "frozen_head_fwd_kernel": (255, 0, 32768),
        },
        "sm_90 bf16 everything unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
            "frozen_head_fwd_kernel": (255, 0, 32768),
        },
        "sm_100 bf16 plain unaligned": {
            "linear_logps_fwd_kernel": (252, 0, 65552),
            "linear_logps_bwd_kernel": (255, 0, 65552),
            "frozen_head_fwd_kernel": (254, 0, 65552),
        },
        "sm_100 bf16 everything unaligned": {
            "linear_logps_fwd_kernel": (254, 0, 65552),
            "linear_logps_bwd_kernel": (255, 0, 65552),
            "frozen_head_fwd_kernel": (255, 128, 65552),
        },
        "sm_90 fp16 plain": {
            "linear_logps_fwd_kernel": (252, 0, 197152),
            "linear_logps_bwd_kernel": (255, 0, 229408),
            "frozen_head_fwd_kernel": (255, 0, 196640),
        },
        "sm_80 bf16 plain sparse": {
            "draw_kernel": (114, 0, 40960),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (169, 0, 49152),
            "row_limited_gemm_kernel": (194, 0, 65536),
            "linear_logps_bwd_kernel": (229, 0, 65536),
        },
        "sm_80 bf16 everything sparse": {
            "draw_kernel": (132, 0, 40960),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (171, 0, 49152),
            "row_limited_gemm_kernel": (194, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "sm_90 bf16 plain sparse": {
            "draw_kernel": (224, 0, 73728),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (242, 0, 122880),
            "row_limited_gemm_kernel": (195, 0, 98304),
            "linear_logps_bwd_kernel": (255, 0, 229408),
        },
        "sm_90 bf16 everything sparse": {
            "draw_kernel": (225, 0, 73728),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (242, 0, 122880),
            "row_limited_gemm_kernel": (195, 0, 98304),
            "linear_logps_bwd_kernel": (255, 128, 229408),
        },
        "sm_100 bf16 plain sparse": {
            "draw_kernel": (191, 0, 73728),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (238, 0, 122896),
            "row_limited_gemm_kernel": (232, 0, 98320),
            "linear_logps_bwd_kernel": (255, 256, 204848),
        },
        "sm_100 bf16 everything sparse": {
            "draw_kernel": (199, 0, 73728),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (199, 0, 122896),
            "row_limited_gemm_kernel": (232, 0, 98320),
            "linear_logps_bwd_kernel": (255, 448, 196656),
        },
        "gfx942 bf16 plain sparse": {
            "draw_kernel": (247, 0, 40960),
            "visit_kernel": (94, 0, 49152),
            "row_limited_gemm_kernel": (136, 0, 32768),
            "linear_logps_bwd_kernel": (166, 0, 32768),
            "weighted_rows_kernel": (58, 0, 8192),
        },
        "gfx942 bf16 everything sparse": {
            "draw_kernel": (256, 128, 40960),
            "visit_kernel": (96, 0, 49152),
            "row_limited_gemm_kernel": (136, 0, 32768),
            "linear_logps_bwd_kernel": (209, 0, 65536),
            "weighted_rows_kernel": (58, 0, 8192),
        },
        "sm_90 fp32 everything sparse": {
            "draw_kernel": (167, 0, 40960),
            "non_target_kernel": (150, 0, 8192),
            "visit_kernel": (178, 0, 49152),
            "row_limited_gemm_kernel": (202, 0, 65536),
            "linear_logps_bwd_kernel": (255, 384, 65536),
        },
    },
}

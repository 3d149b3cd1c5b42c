"""Budgets of the compile-only gate, per Triton version: registers, spilled bytes a thread, shared bytes.

Made by `python tests/compile_only.py --budgets` under each version: registers with a margin of 8 (the limit is 255 on
NVIDIA), spills rounded up to 64. What spills: float32, sm_100, and on sm_90 linear_logps_bwd_kernel and
frozen_head_fwd_kernel with everything on. Of the kernels of `sparse` rows linear_logps_bwd_kernel spills, and on gfx942
draw_kernel with everything on. Kernels that are not named must fit 192 registers, 4 KiB of shared memory, and spill
nothing.
"""

# Bytes of shared memory that a block may ask for.
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
SHARED_LIMIT |= {"gfx90a": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536}

BUDGETS: dict[str, dict[str, dict[str, tuple[int, int, int]]]] = {
    "3.6": {
        "sm_80 bf16 plain": {
            "linear_logps_fwd_kernel": (189, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (211, 0, 65536),
        },
        "sm_80 bf16 everything": {
            "linear_logps_fwd_kernel": (188, 0, 65536),
            "combine_kernel": (255, 0, 512),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 plain": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 everything": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "combine_kernel": (255, 0, 512),
            "frozen_head_fwd_kernel": (255, 64, 65536),
            "linear_logps_bwd_kernel": (255, 704, 65536),
        },
        "sm_86 bf16 plain": {
            "linear_logps_fwd_kernel": (180, 0, 32768),
            "frozen_head_fwd_kernel": (247, 0, 32768),
            "linear_logps_bwd_kernel": (199, 0, 32768),
        },
        "sm_86 bf16 everything": {
            "linear_logps_fwd_kernel": (180, 0, 32768),
            "combine_kernel": (255, 0, 512),
            "frozen_head_fwd_kernel": (255, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
        },
        "sm_86 fp32 plain": {
            "linear_logps_fwd_kernel": (136, 0, 24576),
            "frozen_head_fwd_kernel": (136, 0, 24576),
            "linear_logps_bwd_kernel": (136, 0, 24576),
        },
        "sm_86 fp32 everything": {
            "linear_logps_fwd_kernel": (136, 0, 24576),
            "combine_kernel": (255, 0, 512),
            "frozen_head_fwd_kernel": (136, 64, 24576),
            "linear_logps_bwd_kernel": (246, 0, 24576),
        },
        "sm_90 bf16 plain": {
            "linear_logps_fwd_kernel": (251, 0, 197152),
            "frozen_head_fwd_kernel": (255, 0, 196640),
            "linear_logps_bwd_kernel": (255, 0, 229408),
        },
        "sm_90 bf16 everything": {
            "linear_logps_fwd_kernel": (255, 0, 208928),
            "combine_kernel": (255, 0, 512),
            "frozen_head_fwd_kernel": (255, 320, 196640),
            "linear_logps_bwd_kernel": (255, 128, 229408),
        },
        "sm_90 fp32 plain": {
            "linear_logps_fwd_kernel": (252, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "sm_90 fp32 everything": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "combine_kernel": (255, 0, 512),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 896, 65536),
        },
        "sm_100 bf16 plain": {
            "linear_logps_fwd_kernel": (255, 0, 197680),
            "frozen_head_fwd_kernel": (255, 0, 196656),
            "linear_logps_bwd_kernel": (255, 0, 204848),
        },
        "sm_100 bf16 everything": {
            "linear_logps_fwd_kernel": (255, 0, 196656),
            "combine_kernel": (255, 0, 512),
            "frozen_head_fwd_kernel": (255, 448, 196656),
            "linear_logps_bwd_kernel": (255, 128, 196656),
        },
        "sm_100 fp32 plain": {
            "linear_logps_fwd_kernel": (198, 0, 65536),
            "frozen_head_fwd_kernel": (220, 0, 65536),
            "linear_logps_bwd_kernel": (182, 0, 65536),
        },
        "sm_100 fp32 everything": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "combine_kernel": (255, 0, 512),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 832, 65536),
        },
        "gfx942 bf16 plain": {
            "linear_logps_fwd_kernel": (138, 0, 32768),
            "frozen_head_fwd_kernel": (155, 0, 32768),
            "derivative_kernel": (66, 0, 8192),
            "linear_logps_bwd_kernel": (140, 0, 32768),
        },
        "gfx942 bf16 everything": {
            "linear_logps_fwd_kernel": (176, 0, 32768),
            "frozen_head_fwd_kernel": (176, 0, 32768),
            "derivative_kernel": (66, 0, 8192),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "gfx942 fp32 plain": {
            "linear_logps_fwd_kernel": (172, 0, 32768),
            "frozen_head_fwd_kernel": (185, 0, 32768),
            "linear_logps_bwd_kernel": (168, 0, 32768),
        },
        "gfx942 fp32 everything": {
            "linear_logps_fwd_kernel": (186, 0, 32768),
            "frozen_head_fwd_kernel": (199, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "gfx950 bf16 plain": {
            "linear_logps_fwd_kernel": (124, 0, 32768),
            "frozen_head_fwd_kernel": (133, 0, 32768),
            "derivative_kernel": (66, 0, 8192),
            "linear_logps_bwd_kernel": (125, 0, 32768),
        },
        "gfx950 bf16 everything": {
            "linear_logps_fwd_kernel": (163, 0, 32768),
            "frozen_head_fwd_kernel": (152, 0, 32768),
            "derivative_kernel": (66, 0, 8192),
            "linear_logps_bwd_kernel": (238, 0, 65536),
        },
        "gfx950 fp32 plain": {
            "linear_logps_fwd_kernel": (130, 0, 32768),
            "frozen_head_fwd_kernel": (145, 0, 32768),
            "linear_logps_bwd_kernel": (136, 0, 32768),
        },
        "gfx950 fp32 everything": {
            "linear_logps_fwd_kernel": (167, 0, 32768),
            "frozen_head_fwd_kernel": (163, 0, 32768),
            "linear_logps_bwd_kernel": (242, 0, 65536),
        },
        "gfx90a bf16 plain": {
            "linear_logps_fwd_kernel": (136, 0, 32768),
            "frozen_head_fwd_kernel": (151, 0, 32768),
            "derivative_kernel": (66, 0, 8192),
            "linear_logps_bwd_kernel": (140, 0, 32768),
        },
        "gfx90a bf16 everything": {
            "linear_logps_fwd_kernel": (176, 0, 32768),
            "frozen_head_fwd_kernel": (168, 0, 32768),
            "derivative_kernel": (66, 0, 8192),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "gfx90a fp32 plain": {
            "linear_logps_fwd_kernel": (172, 0, 32768),
            "frozen_head_fwd_kernel": (185, 0, 32768),
            "linear_logps_bwd_kernel": (168, 0, 32768),
        },
        "gfx90a fp32 everything": {
            "linear_logps_fwd_kernel": (186, 0, 32768),
            "frozen_head_fwd_kernel": (199, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "gfx1100 bf16 plain": {
            "linear_logps_fwd_kernel": (174, 0, 12288),
            "frozen_head_fwd_kernel": (193, 0, 12288),
            "linear_logps_bwd_kernel": (186, 0, 12288),
        },
        "gfx1100 bf16 everything": {
            "linear_logps_fwd_kernel": (202, 0, 12288),
            "frozen_head_fwd_kernel": (249, 0, 12288),
            "linear_logps_bwd_kernel": (246, 0, 12288),
        },
        "gfx1100 fp32 plain": {"frozen_head_fwd_kernel": (139, 0, 16384), "linear_logps_bwd_kernel": (135, 0, 16384)},
        "gfx1100 fp32 everything": {
            "frozen_head_fwd_kernel": (201, 0, 16384),
            "linear_logps_bwd_kernel": (244, 0, 16384),
        },
        "gfx1201 bf16 plain": {
            "linear_logps_fwd_kernel": (197, 0, 16384),
            "frozen_head_fwd_kernel": (209, 0, 16384),
            "linear_logps_bwd_kernel": (195, 0, 16384),
        },
        "gfx1201 bf16 everything": {
            "linear_logps_fwd_kernel": (256, 0, 16384),
            "frozen_head_fwd_kernel": (246, 0, 16384),
            "linear_logps_bwd_kernel": (256, 64, 16384),
        },
        "gfx1201 fp32 plain": {
            "linear_logps_fwd_kernel": (208, 0, 8192),
            "frozen_head_fwd_kernel": (216, 0, 8192),
            "linear_logps_bwd_kernel": (217, 0, 8192),
        },
        "gfx1201 fp32 everything": {
            "linear_logps_fwd_kernel": (214, 0, 8192),
            "frozen_head_fwd_kernel": (220, 0, 8192),
            "linear_logps_bwd_kernel": (249, 0, 8192),
        },
        "sm_90 bf16 plain unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 32768),
            "frozen_head_fwd_kernel": (255, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
        },
        "sm_90 bf16 everything unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 32768),
            "combine_kernel": (255, 0, 512),
            "frozen_head_fwd_kernel": (255, 64, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
        },
        "sm_100 bf16 plain unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 65552),
            "frozen_head_fwd_kernel": (255, 64, 65552),
            "linear_logps_bwd_kernel": (255, 128, 65552),
        },
        "sm_100 bf16 everything unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 65552),
            "combine_kernel": (255, 0, 512),
            "frozen_head_fwd_kernel": (255, 128, 65552),
            "linear_logps_bwd_kernel": (255, 64, 65552),
        },
        "sm_90 fp16 plain": {
            "linear_logps_fwd_kernel": (251, 0, 197152),
            "frozen_head_fwd_kernel": (255, 0, 196640),
            "linear_logps_bwd_kernel": (255, 0, 229408),
        },
        "sm_80 bf16 plain sparse": {
            "visit_kernel": (171, 0, 49152),
            "non_target_kernel": (150, 0, 8192),
            "draw_kernel": (181, 0, 40960),
            "linear_logps_bwd_kernel": (222, 0, 65536),
            "row_limited_gemm_kernel": (194, 0, 65536),
        },
        "sm_80 bf16 everything sparse": {
            "visit_kernel": (203, 0, 49152),
            "non_target_kernel": (150, 0, 8192),
            "draw_kernel": (247, 0, 40960),
            "linear_logps_bwd_kernel": (252, 0, 65536),
            "row_limited_gemm_kernel": (194, 0, 65536),
        },
        "sm_90 bf16 plain sparse": {
            "visit_kernel": (245, 0, 122880),
            "non_target_kernel": (150, 0, 8192),
            "draw_kernel": (221, 0, 73728),
            "linear_logps_bwd_kernel": (255, 0, 229408),
            "row_limited_gemm_kernel": (202, 0, 98304),
        },
        "sm_90 bf16 everything sparse": {
            "visit_kernel": (240, 0, 122880),
            "non_target_kernel": (150, 0, 8192),
            "draw_kernel": (252, 0, 73728),
            "linear_logps_bwd_kernel": (255, 64, 229408),
            "row_limited_gemm_kernel": (202, 0, 98304),
        },
        "sm_100 bf16 plain sparse": {
            "visit_kernel": (255, 0, 122896),
            "non_target_kernel": (148, 0, 8192),
            "draw_kernel": (190, 0, 73728),
            "linear_logps_bwd_kernel": (255, 0, 204848),
            "row_limited_gemm_kernel": (232, 0, 98320),
        },
        "sm_100 bf16 everything sparse": {
            "visit_kernel": (248, 0, 122896),
            "non_target_kernel": (148, 0, 8192),
            "draw_kernel": (252, 0, 73728),
            "linear_logps_bwd_kernel": (255, 128, 196656),
            "row_limited_gemm_kernel": (232, 0, 98320),
        },
        "gfx942 bf16 plain sparse": {
            "visit_kernel": (139, 0, 49152),
            "draw_kernel": (216, 0, 40960),
            "linear_logps_bwd_kernel": (138, 0, 32768),
            "row_limited_gemm_kernel": (114, 0, 32768),
            "weighted_rows_kernel": (62, 0, 8192),
        },
        "gfx942 bf16 everything sparse": {
            "visit_kernel": (149, 0, 49152),
            "draw_kernel": (242, 0, 40960),
            "linear_logps_bwd_kernel": (254, 0, 65536),
            "row_limited_gemm_kernel": (114, 0, 32768),
            "weighted_rows_kernel": (62, 0, 8192),
        },
        "sm_90 fp32 everything sparse": {
            "visit_kernel": (210, 0, 49152),
            "non_target_kernel": (150, 0, 8192),
            "draw_kernel": (160, 0, 40960),
            "linear_logps_bwd_kernel": (255, 320, 65536),
            "row_limited_gemm_kernel": (202, 0, 65536),
        },
        "sm_90 bf16 plain library": {
            "linear_logps_fwd_kernel": (255, 0, 2048),
            "frozen_head_fwd_kernel": (238, 0, 256),
            "linear_logps_bwd_kernel": (193, 0, 8192),
        },
        "sm_90 bf16 everything library": {
            "linear_logps_fwd_kernel": (255, 448, 2048),
            "frozen_head_fwd_kernel": (250, 0, 512),
            "linear_logps_bwd_kernel": (255, 448, 8192),
        },
    },
    "3.7": {
        "sm_80 bf16 plain": {
            "linear_logps_fwd_kernel": (188, 0, 65536),
            "frozen_head_fwd_kernel": (250, 0, 65536),
            "linear_logps_bwd_kernel": (210, 0, 65536),
        },
        "sm_80 bf16 everything": {
            "linear_logps_fwd_kernel": (184, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 plain": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 everything": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 128, 65536),
        },
        "sm_86 bf16 plain": {
            "linear_logps_fwd_kernel": (184, 0, 32768),
            "frozen_head_fwd_kernel": (243, 0, 32768),
            "linear_logps_bwd_kernel": (201, 0, 32768),
        },
        "sm_86 bf16 everything": {
            "linear_logps_fwd_kernel": (180, 0, 32768),
            "frozen_head_fwd_kernel": (255, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
        },
        "sm_86 fp32 plain": {
            "linear_logps_fwd_kernel": (136, 0, 24576),
            "frozen_head_fwd_kernel": (136, 0, 24576),
            "linear_logps_bwd_kernel": (136, 0, 24576),
        },
        "sm_86 fp32 everything": {
            "linear_logps_fwd_kernel": (136, 0, 24576),
            "frozen_head_fwd_kernel": (136, 0, 24576),
            "linear_logps_bwd_kernel": (248, 0, 24576),
        },
        "sm_90 bf16 plain": {
            "linear_logps_fwd_kernel": (251, 0, 197152),
            "frozen_head_fwd_kernel": (255, 0, 196640),
            "linear_logps_bwd_kernel": (255, 0, 229408),
        },
        "sm_90 bf16 everything": {
            "linear_logps_fwd_kernel": (255, 0, 208928),
            "frozen_head_fwd_kernel": (255, 384, 196640),
            "linear_logps_bwd_kernel": (255, 128, 229408),
        },
        "sm_90 fp32 plain": {
            "linear_logps_fwd_kernel": (250, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 0, 65536),
        },
        "sm_90 fp32 everything": {
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 128, 65536),
        },
        "sm_100 bf16 plain": {
            "linear_logps_fwd_kernel": (255, 320, 197680),
            "frozen_head_fwd_kernel": (255, 512, 196656),
            "linear_logps_bwd_kernel": (255, 64, 204848),
        },
        "sm_100 bf16 everything": {
            "linear_logps_fwd_kernel": (255, 448, 196656),
            "frozen_head_fwd_kernel": (255, 1216, 196656),
            "linear_logps_bwd_kernel": (255, 384, 196656),
        },
        "sm_100 fp32 plain": {
            "linear_logps_fwd_kernel": (210, 0, 65536),
            "frozen_head_fwd_kernel": (174, 0, 65536),
            "linear_logps_bwd_kernel": (176, 0, 65536),
        },
        "sm_100 fp32 everything": {
            "gather_rows_kernel": (72, 64, 1024),
            "linear_logps_fwd_kernel": (255, 0, 65536),
            "frozen_head_fwd_kernel": (255, 0, 65536),
            "linear_logps_bwd_kernel": (255, 192, 65536),
        },
        "gfx942 bf16 plain": {
            "linear_logps_fwd_kernel": (166, 0, 32768),
            "frozen_head_fwd_kernel": (179, 0, 32768),
            "derivative_kernel": (46, 0, 8192),
            "linear_logps_bwd_kernel": (168, 0, 32768),
        },
        "gfx942 bf16 everything": {
            "linear_logps_fwd_kernel": (177, 0, 32768),
            "frozen_head_fwd_kernel": (201, 0, 32768),
            "derivative_kernel": (51, 0, 8192),
            "linear_logps_bwd_kernel": (214, 0, 65536),
        },
        "gfx942 fp32 plain": {
            "linear_logps_fwd_kernel": (174, 0, 32768),
            "frozen_head_fwd_kernel": (197, 0, 32768),
            "linear_logps_bwd_kernel": (172, 0, 32768),
        },
        "gfx942 fp32 everything": {
            "linear_logps_fwd_kernel": (204, 0, 32768),
            "frozen_head_fwd_kernel": (218, 0, 32768),
            "linear_logps_bwd_kernel": (218, 0, 65536),
        },
        "gfx950 bf16 plain": {
            "linear_logps_fwd_kernel": (132, 0, 32768),
            "frozen_head_fwd_kernel": (147, 0, 32768),
            "derivative_kernel": (46, 0, 8192),
            "linear_logps_bwd_kernel": (134, 0, 32768),
        },
        "gfx950 bf16 everything": {
            "linear_logps_fwd_kernel": (164, 0, 32768),
            "frozen_head_fwd_kernel": (149, 0, 32768),
            "derivative_kernel": (51, 0, 8192),
            "linear_logps_bwd_kernel": (192, 0, 65536),
        },
        "gfx950 fp32 plain": {
            "linear_logps_fwd_kernel": (166, 0, 32768),
            "frozen_head_fwd_kernel": (179, 0, 32768),
            "linear_logps_bwd_kernel": (166, 0, 32768),
        },
        "gfx950 fp32 everything": {
            "linear_logps_fwd_kernel": (178, 0, 32768),
            "frozen_head_fwd_kernel": (200, 0, 32768),
            "linear_logps_bwd_kernel": (200, 0, 65536),
        },
        "gfx90a bf16 plain": {
            "linear_logps_fwd_kernel": (140, 0, 32768),
            "frozen_head_fwd_kernel": (153, 0, 32768),
            "derivative_kernel": (46, 0, 8192),
            "linear_logps_bwd_kernel": (140, 0, 32768),
        },
        "gfx90a bf16 everything": {
            "linear_logps_fwd_kernel": (182, 0, 32768),
            "frozen_head_fwd_kernel": (170, 0, 32768),
            "derivative_kernel": (50, 0, 8192),
            "linear_logps_bwd_kernel": (250, 0, 65536),
        },
        "gfx90a fp32 plain": {
            "linear_logps_fwd_kernel": (172, 0, 32768),
            "frozen_head_fwd_kernel": (197, 0, 32768),
            "linear_logps_bwd_kernel": (180, 0, 32768),
        },
        "gfx90a fp32 everything": {
            "linear_logps_fwd_kernel": (203, 0, 32768),
            "frozen_head_fwd_kernel": (218, 0, 32768),
            "linear_logps_bwd_kernel": (249, 0, 65536),
        },
        "gfx1100 bf16 plain": {
            "linear_logps_fwd_kernel": (173, 0, 12288),
            "frozen_head_fwd_kernel": (193, 0, 12288),
            "linear_logps_bwd_kernel": (197, 0, 12288),
        },
        "gfx1100 bf16 everything": {
            "linear_logps_fwd_kernel": (199, 0, 12288),
            "frozen_head_fwd_kernel": (249, 0, 12288),
            "linear_logps_bwd_kernel": (244, 0, 12288),
        },
        "gfx1100 fp32 plain": {"frozen_head_fwd_kernel": (133, 0, 16384), "linear_logps_bwd_kernel": (134, 0, 16384)},
        "gfx1100 fp32 everything": {
            "frozen_head_fwd_kernel": (196, 0, 16384),
            "linear_logps_bwd_kernel": (229, 0, 16384),
        },
        "gfx1201 bf16 plain": {
            "linear_logps_fwd_kernel": (197, 0, 16384),
            "frozen_head_fwd_kernel": (208, 0, 16384),
            "linear_logps_bwd_kernel": (195, 0, 16384),
        },
        "gfx1201 bf16 everything": {
            "linear_logps_fwd_kernel": (256, 0, 16384),
            "frozen_head_fwd_kernel": (241, 0, 16384),
            "linear_logps_bwd_kernel": (235, 0, 16384),
        },
        "gfx1201 fp32 plain": {
            "linear_logps_fwd_kernel": (220, 0, 8192),
            "frozen_head_fwd_kernel": (227, 0, 8192),
            "linear_logps_bwd_kernel": (228, 0, 8192),
        },
        "gfx1201 fp32 everything": {
            "linear_logps_fwd_kernel": (228, 0, 8192),
            "frozen_head_fwd_kernel": (234, 0, 8192),
            "linear_logps_bwd_kernel": (247, 0, 8192),
        },
        "sm_90 bf16 plain unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 32768),
            "frozen_head_fwd_kernel": (255, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
        },
        "sm_90 bf16 everything unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 32768),
            "frozen_head_fwd_kernel": (255, 0, 32768),
            "linear_logps_bwd_kernel": (255, 0, 32768),
        },
        "sm_100 bf16 plain unaligned": {
            "linear_logps_fwd_kernel": (255, 0, 65552),
            "frozen_head_fwd_kernel": (255, 0, 65552),
            "linear_logps_bwd_kernel": (255, 0, 65552),
        },
        "sm_100 bf16 everything unaligned": {
            "linear_logps_fwd_kernel": (255, 64, 65552),
            "frozen_head_fwd_kernel": (255, 128, 65552),
            "linear_logps_bwd_kernel": (255, 0, 65552),
        },
        "sm_90 fp16 plain": {
            "linear_logps_fwd_kernel": (251, 0, 197152),
            "frozen_head_fwd_kernel": (255, 0, 196640),
            "linear_logps_bwd_kernel": (255, 0, 229408),
        },
        "sm_80 bf16 plain sparse": {
            "visit_kernel": (193, 0, 49152),
            "non_target_kernel": (148, 0, 8192),
            "draw_kernel": (132, 0, 40960),
            "linear_logps_bwd_kernel": (239, 0, 65536),
            "row_limited_gemm_kernel": (194, 0, 65536),
        },
        "sm_80 bf16 everything sparse": {
            "visit_kernel": (206, 0, 49152),
            "non_target_kernel": (148, 0, 8192),
            "draw_kernel": (131, 0, 40960),
            "linear_logps_bwd_kernel": (255, 0, 65536),
            "row_limited_gemm_kernel": (194, 0, 65536),
        },
        "sm_90 bf16 plain sparse": {
            "visit_kernel": (242, 0, 122880),
            "non_target_kernel": (150, 0, 8192),
            "draw_kernel": (224, 0, 73728),
            "linear_logps_bwd_kernel": (255, 0, 229408),
            "row_limited_gemm_kernel": (195, 0, 98304),
        },
        "sm_90 bf16 everything sparse": {
            "visit_kernel": (240, 0, 122880),
            "non_target_kernel": (150, 0, 8192),
            "draw_kernel": (228, 0, 73728),
            "linear_logps_bwd_kernel": (255, 128, 229408),
            "row_limited_gemm_kernel": (195, 0, 98304),
        },
        "sm_100 bf16 plain sparse": {
            "visit_kernel": (254, 0, 122896),
            "non_target_kernel": (148, 0, 8192),
            "draw_kernel": (191, 0, 73728),
            "linear_logps_bwd_kernel": (255, 64, 204848),
            "row_limited_gemm_kernel": (232, 0, 98320),
        },
        "sm_100 bf16 everything sparse": {
            "visit_kernel": (239, 0, 122896),
            "non_target_kernel": (148, 0, 8192),
            "draw_kernel": (195, 0, 73728),
            "linear_logps_bwd_kernel": (255, 320, 196656),
            "row_limited_gemm_kernel": (232, 0, 98320),
        },
        "gfx942 bf16 plain sparse": {
            "visit_kernel": (145, 0, 49152),
            "draw_kernel": (225, 0, 40960),
            "linear_logps_bwd_kernel": (166, 0, 32768),
            "row_limited_gemm_kernel": (136, 0, 32768),
            "weighted_rows_kernel": (58, 0, 8192),
        },
        "gfx942 bf16 everything sparse": {
            "visit_kernel": (155, 0, 49152),
            "draw_kernel": (256, 128, 40960),
            "linear_logps_bwd_kernel": (207, 0, 65536),
            "row_limited_gemm_kernel": (136, 0, 32768),
            "weighted_rows_kernel": (58, 0, 8192),
        },
        "sm_90 fp32 everything sparse": {
            "visit_kernel": (216, 0, 49152),
            "non_target_kernel": (150, 0, 8192),
            "draw_kernel": (165, 0, 40960),
            "linear_logps_bwd_kernel": (255, 448, 65536),
            "row_limited_gemm_kernel": (202, 0, 65536),
        },
        "sm_90 bf16 plain library": {
            "linear_logps_fwd_kernel": (255, 0, 2048),
            "linear_logps_bwd_kernel": (180, 0, 8192),
        },
        "sm_90 bf16 everything library": {
            "linear_logps_fwd_kernel": (255, 64, 2048),
            "frozen_head_fwd_kernel": (221, 0, 512),
            "linear_logps_bwd_kernel": (255, 0, 8192),
        },
    },
}

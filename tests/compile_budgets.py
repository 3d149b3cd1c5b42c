"""Budgets of the compile-only gate, per Triton version: registers, spilled bytes a thread, shared bytes.

Figures of `python tests/compile_only.py`: registers with a margin of 8 (the limit is 255), spills rounded up to 64.
What spills: float32, sm_100, and on sm_90 d_logits and the weights of the derivative with everything on. The kernels
of `sparse` rows spill nowhere, d_logits apart. Kernels that are not named must fit 192 registers, 4 KiB of shared
memory, and spill nothing.
"""

# Bytes of shared memory that a block may ask for.
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}

BUDGETS: dict[str, dict[str, dict[str, tuple[int, int, int]]]] = {
    "3.6": {
        "sm_80 bf16 plain": {
            "tiles_kernel": (215, 0, 65536),
            "d_logits_kernel": (224, 0, 65536),
            "weights_kernel": (255, 0, 65536),
        },
        "sm_80 bf16 everything": {
            "tiles_kernel": (223, 0, 65536),
            "d_logits_kernel": (255, 0, 65536),
            "combine_kernel": (210, 0, 1024),
            "weights_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 plain": {
            "tiles_kernel": (255, 0, 65536),
            "d_logits_kernel": (255, 0, 65536),
            "weights_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 everything": {
            "tiles_kernel": (255, 0, 65536),
            "d_logits_kernel": (255, 704, 65536),
            "combine_kernel": (210, 0, 1024),
            "weights_kernel": (255, 64, 65536),
        },
        "sm_86 bf16 plain": {
            "tiles_kernel": (188, 0, 32768),
            "d_logits_kernel": (225, 0, 32768),
            "weights_kernel": (249, 0, 32768),
        },
        "sm_86 bf16 everything": {
            "tiles_kernel": (224, 0, 32768),
            "d_logits_kernel": (255, 0, 32768),
            "combine_kernel": (210, 0, 1024),
            "weights_kernel": (255, 0, 32768),
        },
        "sm_86 fp32 plain": {
            "tiles_kernel": (136, 0, 24576),
            "d_logits_kernel": (136, 0, 24576),
            "weights_kernel": (136, 0, 24576),
        },
        "sm_86 fp32 everything": {
            "tiles_kernel": (136, 0, 24576),
            "d_logits_kernel": (255, 0, 24576),
            "combine_kernel": (210, 0, 1024),
            "weights_kernel": (198, 0, 24576),
        },
        "sm_90 bf16 plain": {
            "tiles_kernel": (251, 0, 197152),
            "d_logits_kernel": (255, 0, 229408),
            "weights_kernel": (255, 0, 196640),
        },
        "sm_90 bf16 everything": {
            "tiles_kernel": (255, 0, 208928),
            "d_logits_kernel": (255, 128, 229408),
            "combine_kernel": (214, 0, 1024),
            "weights_kernel": (255, 256, 196640),
        },
        "sm_90 fp32 plain": {
            "tiles_kernel": (250, 0, 65536),
            "d_logits_kernel": (255, 0, 65536),
            "weights_kernel": (243, 0, 65536),
        },
        "sm_90 fp32 everything": {
            "tiles_kernel": (255, 0, 65536),
            "d_logits_kernel": (255, 768, 65536),
            "combine_kernel": (214, 0, 1024),
            "weights_kernel": (255, 64, 65536),
        },
        "sm_100 bf16 plain": {
            "tiles_kernel": (255, 0, 197680),
            "d_logits_kernel": (255, 0, 204848),
            "weights_kernel": (255, 0, 196656),
        },
        "sm_100 bf16 everything": {
            "tiles_kernel": (255, 0, 196656),
            "d_logits_kernel": (255, 128, 196656),
            "weights_kernel": (255, 384, 196656),
        },
        "sm_100 fp32 plain": {
            "tiles_kernel": (192, 0, 65536),
            "d_logits_kernel": (201, 0, 65536),
            "weights_kernel": (254, 0, 65536),
        },
        "sm_100 fp32 everything": {
            "tiles_kernel": (248, 0, 65536),
            "d_logits_kernel": (255, 832, 65536),
            "weights_kernel": (255, 64, 65536),
        },
        "gfx942 bf16 plain": {
            "tiles_kernel": (138, 0, 32768),
            "d_logits_kernel": (140, 0, 32768),
            "weights_kernel": (155, 0, 32768),
            "derivative_kernel": (66, 0, 8192),
        },
        "gfx942 bf16 everything": {
            "tiles_kernel": (173, 0, 32768),
            "d_logits_kernel": (262, 0, 65536),
            "weights_kernel": (175, 0, 32768),
            "derivative_kernel": (66, 0, 8192),
        },
        "gfx942 fp32 plain": {
            "tiles_kernel": (172, 0, 32768),
            "d_logits_kernel": (170, 0, 32768),
            "weights_kernel": (183, 0, 32768),
        },
        "gfx942 fp32 everything": {
            "tiles_kernel": (186, 0, 32768),
            "d_logits_kernel": (264, 64, 65536),
            "weights_kernel": (197, 0, 32768),
        },
        "sm_90 bf16 plain unaligned": {
            "tiles_kernel": (255, 0, 32768),
            "d_logits_kernel": (255, 0, 32768),
            "weights_kernel": (255, 64, 32768),
        },
        "sm_90 bf16 everything unaligned": {
            "tiles_kernel": (255, 0, 32768),
            "d_logits_kernel": (255, 0, 32768),
            "combine_kernel": (214, 0, 1024),
            "weights_kernel": (255, 128, 32768),
        },
        "sm_100 bf16 plain unaligned": {
            "tiles_kernel": (255, 0, 65552),
            "d_logits_kernel": (255, 128, 65552),
            "weights_kernel": (255, 128, 65552),
        },
        "sm_100 bf16 everything unaligned": {
            "tiles_kernel": (252, 0, 65552),
            "d_logits_kernel": (255, 128, 65552),
            "weights_kernel": (255, 192, 65552),
        },
        "sm_90 fp16 plain": {
            "tiles_kernel": (251, 0, 197152),
            "d_logits_kernel": (255, 0, 229408),
            "weights_kernel": (255, 0, 196640),
        },
        "sm_80 bf16 plain sparse": {
            "visit_kernel": (169, 0, 49152),
            "live_product_kernel": (194, 0, 65536),
            "d_logits_kernel": (229, 0, 65536),
        },
        "sm_80 bf16 everything sparse": {
            "visit_kernel": (175, 0, 49152),
            "live_product_kernel": (194, 0, 65536),
            "d_logits_kernel": (255, 0, 65536),
        },
        "sm_90 bf16 plain sparse": {
            "visit_kernel": (243, 0, 122880),
            "live_product_kernel": (202, 0, 98304),
            "d_logits_kernel": (255, 0, 229408),
        },
        "sm_90 bf16 everything sparse": {
            "visit_kernel": (244, 0, 122880),
            "live_product_kernel": (202, 0, 98304),
            "d_logits_kernel": (255, 64, 229408),
        },
        "sm_100 bf16 plain sparse": {
            "visit_kernel": (232, 0, 122896),
            "live_product_kernel": (232, 0, 98320),
            "d_logits_kernel": (255, 0, 204848),
        },
        "sm_100 bf16 everything sparse": {
            "visit_kernel": (210, 0, 122896),
            "live_product_kernel": (232, 0, 98320),
            "d_logits_kernel": (255, 128, 196656),
        },
        "gfx942 bf16 plain sparse": {
            "visit_kernel": (83, 0, 49152),
            "live_product_kernel": (114, 0, 32768),
            "d_logits_kernel": (138, 0, 32768),
            "weighted_rows_kernel": (62, 0, 8192),
        },
        "gfx942 bf16 everything sparse": {
            "visit_kernel": (86, 0, 49152),
            "live_product_kernel": (114, 0, 32768),
            "d_logits_kernel": (256, 0, 65536),
            "weighted_rows_kernel": (62, 0, 8192),
        },
        "sm_90 fp32 everything sparse": {
            "visit_kernel": (180, 0, 49152),
            "live_product_kernel": (202, 0, 65536),
            "d_logits_kernel": (255, 384, 65536),
        },
    },
    "3.7": {
        "sm_80 bf16 plain": {
            "tiles_kernel": (214, 0, 65536),
            "d_logits_kernel": (223, 0, 65536),
            "weights_kernel": (253, 0, 65536),
        },
        "sm_80 bf16 everything": {
            "tiles_kernel": (221, 0, 65536),
            "d_logits_kernel": (255, 0, 65536),
            "weights_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 plain": {
            "tiles_kernel": (255, 0, 65536),
            "d_logits_kernel": (255, 0, 65536),
            "weights_kernel": (255, 0, 65536),
        },
        "sm_80 fp32 everything": {
            "tiles_kernel": (255, 0, 65536),
            "d_logits_kernel": (255, 384, 65536),
            "weights_kernel": (255, 0, 65536),
        },
        "sm_86 bf16 plain": {
            "tiles_kernel": (192, 0, 32768),
            "d_logits_kernel": (219, 0, 32768),
            "weights_kernel": (241, 0, 32768),
        },
        "sm_86 bf16 everything": {
            "tiles_kernel": (222, 0, 32768),
            "d_logits_kernel": (255, 0, 32768),
            "weights_kernel": (255, 0, 32768),
        },
        "sm_86 fp32 plain": {
            "tiles_kernel": (136, 0, 24576),
            "d_logits_kernel": (136, 0, 24576),
            "weights_kernel": (136, 0, 24576),
        },
        "sm_86 fp32 everything": {
            "tiles_kernel": (136, 0, 24576),
            "d_logits_kernel": (248, 0, 24576),
            "weights_kernel": (136, 0, 24576),
        },
        "sm_90 bf16 plain": {
            "tiles_kernel": (252, 0, 197152),
            "d_logits_kernel": (255, 0, 229408),
            "weights_kernel": (255, 0, 196640),
        },
        "sm_90 bf16 everything": {
            "tiles_kernel": (255, 0, 208928),
            "d_logits_kernel": (255, 128, 229408),
            "weights_kernel": (255, 384, 196640),
        },
        "sm_90 fp32 plain": {
            "tiles_kernel": (250, 0, 65536),
            "d_logits_kernel": (255, 0, 65536),
            "weights_kernel": (255, 0, 65536),
        },
        "sm_90 fp32 everything": {
            "tiles_kernel": (255, 0, 65536),
            "d_logits_kernel": (255, 384, 65536),
            "weights_kernel": (255, 0, 65536),
        },
        "sm_100 bf16 plain": {
            "tiles_kernel": (255, 320, 197680),
            "d_logits_kernel": (255, 256, 204848),
            "weights_kernel": (255, 596, 196656),
        },
        "sm_100 bf16 everything": {
            "tiles_kernel": (255, 384, 196656),
            "d_logits_kernel": (255, 512, 196656),
            "weights_kernel": (255, 1344, 196656),
        },
        "sm_100 fp32 plain": {
            "tiles_kernel": (210, 0, 65536),
            "d_logits_kernel": (178, 0, 65536),
            "weights_kernel": (208, 0, 65536),
        },
        "sm_100 fp32 everything": {
            "tiles_kernel": (255, 0, 65536),
            "gather_rows_kernel": (72, 64, 1024),
            "d_logits_kernel": (255, 512, 65536),
            "weights_kernel": (255, 0, 65536),
        },
        "gfx942 bf16 plain": {
            "tiles_kernel": (162, 0, 32768),
            "d_logits_kernel": (168, 0, 32768),
            "weights_kernel": (179, 0, 32768),
            "derivative_kernel": (46, 0, 8192),
        },
        "gfx942 bf16 everything": {
            "tiles_kernel": (174, 0, 32768),
            "d_logits_kernel": (216, 0, 65536),
            "weights_kernel": (199, 0, 32768),
            "derivative_kernel": (51, 0, 8192),
        },
        "gfx942 fp32 plain": {
            "tiles_kernel": (172, 0, 32768),
            "d_logits_kernel": (174, 0, 32768),
            "weights_kernel": (195, 0, 32768),
        },
        "gfx942 fp32 everything": {
            "tiles_kernel": (204, 0, 32768),
            "d_logits_kernel": (226, 0, 65536),
            "weights_kernel": (215, 0, 32768),
        },
        "sm_90 bf16 plain unaligned": {
            "tiles_kernel": (255, 0, 32768),
            "d_logits_kernel": (255, 0, 32768),
            "weights_kernel": (255, 0, 32768),
        },
        "sm_90 bf16 everything unaligned": {
            "tiles_kernel": (255, 0, 32768),
            "d_logits_kernel": (255, 0, 32768),
            "weights_kernel": (255, 0, 32768),
        },
        "sm_100 bf16 plain unaligned": {
            "tiles_kernel": (252, 0, 65552),
            "d_logits_kernel": (255, 0, 65552),
            "weights_kernel": (254, 0, 65552),
        },
        "sm_100 bf16 everything unaligned": {
            "tiles_kernel": (254, 0, 65552),
            "d_logits_kernel": (255, 0, 65552),
            "weights_kernel": (255, 128, 65552),
        },
        "sm_90 fp16 plain": {
            "tiles_kernel": (252, 0, 197152),
            "d_logits_kernel": (255, 0, 229408),
            "weights_kernel": (255, 0, 196640),
        },
        "sm_80 bf16 plain sparse": {
            "visit_kernel": (169, 0, 49152),
            "live_product_kernel": (194, 0, 65536),
            "d_logits_kernel": (229, 0, 65536),
        },
        "sm_80 bf16 everything sparse": {
            "visit_kernel": (171, 0, 49152),
            "live_product_kernel": (194, 0, 65536),
            "d_logits_kernel": (255, 0, 65536),
        },
        "sm_90 bf16 plain sparse": {
            "visit_kernel": (242, 0, 122880),
            "live_product_kernel": (195, 0, 98304),
            "d_logits_kernel": (255, 0, 229408),
        },
        "sm_90 bf16 everything sparse": {
            "visit_kernel": (242, 0, 122880),
            "live_product_kernel": (195, 0, 98304),
            "d_logits_kernel": (255, 128, 229408),
        },
        "sm_100 bf16 plain sparse": {
            "visit_kernel": (238, 0, 122896),
            "live_product_kernel": (232, 0, 98320),
            "d_logits_kernel": (255, 256, 204848),
        },
        "sm_100 bf16 everything sparse": {
            "visit_kernel": (199, 0, 122896),
            "live_product_kernel": (232, 0, 98320),
            "d_logits_kernel": (255, 448, 196656),
        },
        "gfx942 bf16 plain sparse": {
            "visit_kernel": (94, 0, 49152),
            "live_product_kernel": (136, 0, 32768),
            "d_logits_kernel": (166, 0, 32768),
            "weighted_rows_kernel": (58, 0, 8192),
        },
        "gfx942 bf16 everything sparse": {
            "visit_kernel": (96, 0, 49152),
            "live_product_kernel": (136, 0, 32768),
            "d_logits_kernel": (209, 0, 65536),
            "weighted_rows_kernel": (58, 0, 8192),
        },
        "sm_90 fp32 everything sparse": {
            "visit_kernel": (178, 0, 49152),
            "live_product_kernel": (202, 0, 65536),
            "d_logits_kernel": (255, 384, 65536),
        },
    },
}

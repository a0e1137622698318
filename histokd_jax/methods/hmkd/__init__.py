"""HM-KD: a student that reads H&E tiles learns from CoCoFNet, which reads H&E and IHC (Bai et al., IEEE JBHI 2026)."""

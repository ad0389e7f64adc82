// Loads a network that export_network.py compiled and runs it on images of noise: no Python, nothing of fused-attn.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: run PACKAGE.pt2 BATCH\n";
    return 2;
  }
  try {
    const torch::NoGradGuard no_grad;
    torch::inductor::AOTIModelPackageLoader network(argv[1]);
    // The numbers of export_network.py, so that the two can be compared.
    const auto images = torch::linspace(-1, 1, std::stol(argv[2]) * 3 * 32 * 32).view({-1, 3, 32, 32});
    const std::vector<torch::Tensor> inputs{images};
    std::cout << network.run(inputs).at(0) << "\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}

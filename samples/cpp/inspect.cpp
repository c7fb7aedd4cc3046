// inspect MODEL.xml IMAGE.ppm: what an exported anomaly model says of one image, as a line of JSON.
//
// The graph resizes, normalizes and scores by itself: it takes RGB values in [0, 1] as (1, 3, height, width) of float.
// The threshold is the one in manifest.json beside the model, which `anomalib-ot calibrate` sets. Exit status: 0, or 2
// with a line on standard error.

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <optional>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

namespace {

struct Image {
    size_t width = 0, height = 0;
    std::vector<unsigned char> rgb;
};

// A binary PPM of 8 bits; every camera library and ImageMagick write it.
Image read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + " cannot be read; expected a binary PPM file");
    const auto number = [&]() -> size_t {
        while (file >> std::ws && file.peek() == '#') file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
        long value = 0;
        if (!(file >> value) || value < 1 || value > 65535)
            throw std::runtime_error(path + " is cut off or damaged; expected the width, height and 255 of a PPM file");
        return static_cast<size_t>(value);
    };
    char magic[2] = {};
    file.read(magic, 2);
    if (magic[0] != 'P' || magic[1] != '6')
        throw std::runtime_error(path + " is no binary PPM file (P6); convert it first: convert part.png part.ppm");
    Image image;
    image.width = number();
    image.height = number();
    if (number() != 255) throw std::runtime_error(path + " has not 8 bits per sample; convert it to 8 bits");
    file.get();  // the one blank before the pixels
    image.rgb.resize(3 * image.width * image.height);
    file.read(reinterpret_cast<char*>(image.rgb.data()), static_cast<std::streamsize>(image.rgb.size()));
    if (static_cast<size_t>(file.gcount()) != image.rgb.size())
        throw std::runtime_error(path + " is cut off: it has fewer pixels than its first line says");
    return image;
}

// The image threshold of the manifest; none if there is no manifest, or no threshold in it.
std::optional<double> read_threshold(const std::string& model) {
    const auto slash = model.find_last_of("/\\");
    std::ifstream file((slash == std::string::npos ? "" : model.substr(0, slash + 1)) + "manifest.json");
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::smatch found;
    if (!std::regex_search(text, found, std::regex("\"image_threshold\"\\s*:\\s*(-?[0-9][0-9.eE+-]*)"))) return {};
    return std::stod(found[1]);
}

std::string quoted(const std::string& text) {
    std::ostringstream made;
    made << '"';
    for (const char letter : text) {
        if (letter == '"' || letter == '\\') made << '\\';
        made << (static_cast<unsigned char>(letter) < 0x20 ? '?' : letter);
    }
    made << '"';
    return made.str();
}

ov::Tensor to_tensor(const Image& image) {
    ov::Tensor tensor(ov::element::f32, {1, 3, image.height, image.width});
    float* values = tensor.data<float>();
    const size_t area = image.width * image.height;
    for (size_t pixel = 0; pixel < area; ++pixel)
        for (size_t channel = 0; channel < 3; ++channel)
            values[channel * area + pixel] = static_cast<float>(image.rgb[3 * pixel + channel]) / 255.0F;
    return tensor;
}

void inspect(const std::string& model, const std::string& path) {
    const Image image = read_ppm(path);
    ov::Core core;
    // As the manifest asks for: processors with bfloat16 would otherwise take it, and scores would change.
    auto compiled = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));
    auto request = compiled.create_infer_request();
    request.set_input_tensor(to_tensor(image));
    request.infer();

    const ov::Tensor scores = request.get_tensor("pred_score"), map = request.get_tensor("anomaly_map");
    const double score = scores.data<float>()[0];
    const auto shape = map.get_shape();
    const size_t columns = shape.back(), rows = shape[shape.size() - 2];
    const float* values = map.data<float>();
    const auto highest = static_cast<size_t>(std::max_element(values, values + rows * columns) - values);
    const double x = (static_cast<double>(highest % columns) + 0.5) * static_cast<double>(image.width) / columns;
    const double y = (static_cast<double>(highest / columns) + 0.5) * static_cast<double>(image.height) / rows;

    const auto threshold = read_threshold(model);
    const char* verdict = !threshold ? "unknown" : score > *threshold ? "defect" : "good";
    std::cout << "{\"name\": " << quoted(path) << ", \"verdict\": \"" << verdict << "\", \"score\": " << score
              << ", \"map\": {\"max\": " << values[highest] << ", \"x\": " << x << ", \"y\": " << y << "}}\n";
}

}  // namespace

int main(int count, char** words) {
    if (count != 3) {
        std::cerr << "inspect: error: expected two arguments, MODEL.xml IMAGE.ppm\n";
        return 2;
    }
    try {
        inspect(words[1], words[2]);
    } catch (const std::exception& error) {
        std::cerr << "inspect: error: " << error.what() << "\n";
        return 2;
    }
    return 0;
}
